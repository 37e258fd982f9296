"""In-memory HTTP server with the parts of the Hub's API that huggingface_hub's client uses, with fault injection.

It supports model repositories with commits, branches and tags, regular and LFS uploads, range downloads, and users with
read or write tokens.
"""
import base64
import hashlib
import json
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Callable, Dict, Iterator, List, Optional

import yaml
from werkzeug.exceptions import HTTPException
from werkzeug.routing import Map, Rule
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

LFS_SUFFIXES = ('.safetensors', '.bin', '.pt', '.pth', '.png')
DATE = '2026-01-01T00:00:00.000Z'


@dataclass
class User:
    """Owner of a token, who may write to repositories in `namespaces`; empty for a read-only token."""
    name: str
    namespaces: List[str] = field(default_factory=list)

    def may_write(self, repo: str) -> bool:
        return repo.split('/')[0] in self.namespaces


@dataclass
class File:
    data: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def blob_id(self) -> str:
        """Git blob id; for an LFS file, the id of its pointer file."""
        data = self.data
        if self.is_lfs:
            data = f'version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n'.encode()
        return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()

    @property
    def lfs(self) -> Dict[str, object]:
        return {'lfs': {'oid': self.sha256, 'sha256': self.sha256, 'size': len(self.data), 'pointerSize': 135}} \
            if self.is_lfs else {}


@dataclass
class Commit:
    title: str
    files: Dict[str, File]


@dataclass
class Repo:
    private: bool = False
    commits: Dict[str, Commit] = field(default_factory=dict)  # in chronological order
    branches: Dict[str, str] = field(default_factory=dict)
    tags: Dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, title: str, files: Dict[str, File]) -> str:
        parts = [branch, title, len(self.commits), sorted((path, f.blob_id) for path, f in files.items())]
        oid = hashlib.sha1(json.dumps(parts).encode()).hexdigest()
        self.commits[oid] = Commit(title, files)
        self.branches[branch] = oid
        return oid

    def find(self, revision: str) -> Optional[str]:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return oid if oid in self.commits else None


@dataclass
class Fault:
    """Fault to inject: `kind` is an HTTP error status, 'cut', 'truncate', 'corrupt' or 'slow'.

    It affects the next `times` requests whose method and path match `pattern`, such as 'GET .*/model.safetensors'.
    """
    pattern: str
    kind: str
    times: int = 1


class Error(Exception):
    def __init__(self, status: int, code: str, message: str, **headers: str):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


def answer(data: object, **headers: str) -> Response:
    kind = 'application/octet-stream' if isinstance(data, bytes) else 'application/json'
    response = Response(data if isinstance(data, bytes) else json.dumps(data), content_type=kind)
    for name, value in headers.items():
        response.headers[name.replace('_', '-')] = value
    return response


class LoopbackHub:
    """In-memory Hub. Start it by `with hub.serve() as url`; inspect `repos` and `requests`, and set `faults`."""

    def __init__(self, users: Dict[str, User]):
        self.users = users
        self.repos: Dict[str, Repo] = {}
        self.lfs: Dict[str, bytes] = {}
        self.faults: List[Fault] = []
        self.requests: List[str] = []
        self.lock = threading.RLock()
        repo = '/api/models/<path:repo>'
        self.routes = Map([
            Rule(path, endpoint=endpoint, methods=methods) for path, methods, endpoint in (
                ('/faults', ['POST'], self.set_faults),
                ('/api/whoami-v2', ['GET'], self.whoami),
                ('/api/validate-yaml', ['POST'], self.validate_yaml),
                ('/api/repos/create', ['POST'], self.create_repo),
                ('/api/models', ['GET'], self.list_models),
                (f'{repo}/preupload/<path:revision>', ['POST'], self.preupload),
                ('/<path:repo>.git/info/lfs/objects/batch', ['POST'], self.lfs_batch),
                ('/lfs/<oid>', ['PUT'], self.lfs_put),
                ('/lfs-verify', ['POST'], self.lfs_verify),
                (f'{repo}/commit/<path:revision>', ['POST'], self.commit),
                (f'{repo}/branch/<path:name>', ['POST'], self.create_branch),
                (f'{repo}/tag/<path:revision>', ['POST'], self.create_tag),
                (f'{repo}/refs', ['GET'], self.refs),
                (f'{repo}/commits/<path:revision>', ['GET'], self.list_commits),
                (f'{repo}/tree/<revision>', ['GET'], self.tree),
                (f'{repo}/tree/<revision>/<path:folder>', ['GET'], self.tree),
                (f'{repo}/paths-info/<path:revision>', ['POST'], self.paths_info),
                (f'{repo}/revision/<path:revision>', ['GET'], self.info),
                (repo, ['GET'], self.info),
                ('/<path:repo>/resolve/<revision>/<path:path>', ['GET', 'HEAD'], self.resolve),
            )
        ])

    # -- serving

    @contextmanager
    def serve(self) -> Iterator[str]:
        class Handler(WSGIRequestHandler):
            protocol_version = 'HTTP/1.1'

            def log(self, *args: object) -> None:
                pass

        server = make_server('127.0.0.1', 0, self, threaded=True, request_handler=Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f'http://127.0.0.1:{server.server_port}'
        finally:
            server.shutdown()

    def __call__(self, environ: dict, start_response: Callable) -> Iterator[bytes]:
        request = Request(environ)
        line = f'{request.method} {request.path}'
        with self.lock:
            self.requests.append(line)
            fault = next((f for f in self.faults if f.times > 0 and re.fullmatch(f.pattern, line)), None)
            if fault is not None:
                fault.times -= 1
        return self.respond(request, fault.kind if fault else '')(environ, start_response)

    def respond(self, request: Request, fault: str) -> Response:
        if fault == 'slow':
            time.sleep(3)
        elif fault.isdigit():
            request.get_data()
            return Response(f'fault {fault}', status=int(fault))
        elif fault == 'cut' and request.method in ('PUT', 'POST'):
            request.stream.read(64)
            request.environ['werkzeug.socket'].close()
            raise ConnectionAbortedError('fault: cut during an upload')
        try:
            endpoint, args = self.routes.bind_to_environ(request.environ).match()
            with self.lock:
                response = endpoint(request, **args)
        except Error as e:
            response = answer({'error': str(e)}, X_Error_Code=e.code, X_Error_Message=str(e), **e.headers)
            response.status_code = e.status
        except HTTPException as e:
            response = e.get_response(request.environ)
        return spoil(response, fault) if fault in ('cut', 'truncate', 'corrupt') else response

    def set_faults(self, request: Request) -> Response:
        """Set the faults, `[[pattern, kind, times], ...]`, and delete uploaded files that were not committed."""
        self.faults = [Fault(*values) for values in request.get_json(force=True)]
        self.lfs.clear()
        return answer({})

    # -- permissions

    def user(self, request: Request) -> Optional[User]:
        token = request.headers.get('Authorization', '').removeprefix('Bearer ')
        if not token:
            return None
        if token not in self.users:
            raise Error(401, 'Unauthorized', 'Invalid credentials in Authorization header')
        return self.users[token]

    def writer(self, request: Request, repo: str) -> None:
        user = self.user(request)
        if user is None:
            raise Error(401, 'Unauthorized', 'Authentication is required')
        if not user.may_write(repo):
            raise Error(403, 'Forbidden', f'{user.name} has no write access to {repo}')

    def repo(self, request: Request, name: str) -> Repo:
        user, repo = self.user(request), self.repos.get(name)
        if repo is None or (repo.private and (user is None or not user.may_write(name))):
            raise Error(401 if user is None else 404, 'RepoNotFound', f'Repository {name} not found')
        return repo

    def head(self, repo: Repo, revision: str) -> str:
        oid = repo.find(revision)
        if oid is None:
            raise Error(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        return oid

    # -- accounts and repositories

    def whoami(self, request: Request) -> Response:
        user = self.user(request)
        if user is None:
            raise Error(401, 'Unauthorized', 'Authentication is required')
        return answer({
            'type': 'user', 'name': user.name, 'orgs': [],
            'auth': {'accessToken': {'displayName': 'test', 'role': 'write' if user.namespaces else 'read'}}})

    def validate_yaml(self, request: Request) -> Response:
        match = re.match(r'---\n(.*?)\n---', request.get_json()['content'], re.S)
        is_mapping = match and isinstance(yaml.safe_load(match.group(1)), dict)
        errors = [] if is_mapping else [{'message': 'the card has no metadata'}]
        response = answer({'errors': errors, 'warnings': []})
        response.status_code = 400 if errors else 200
        return response

    def create_repo(self, request: Request) -> Response:
        wanted = request.get_json()
        user = self.user(request)
        name = f'{wanted.get("organization") or (user.name if user else "")}/{wanted["name"]}'
        self.writer(request, name)
        url = f'{request.host_url}{name}'
        if name in self.repos:
            response = answer({'error': 'You already created this model repo', 'url': url})
            response.status_code = 409
            return response
        repo = self.repos[name] = Repo(bool(wanted.get('private') or wanted.get('visibility') == 'private'))
        repo.add('main', 'initial commit', {'.gitattributes': File(b'*.safetensors filter=lfs\n', False)})
        return answer({'url': url, 'name': name, 'id': name})

    def list_models(self, request: Request) -> Response:
        author = request.args.get('author', '')
        return answer([
            self.describe(name, repo, repo.branches['main']) for name, repo in self.repos.items()
            if name.startswith(f'{author}/') and not repo.private])

    def describe(self, name: str, repo: Repo, oid: str) -> Dict[str, object]:
        files = repo.commits[oid].files
        return {
            'id': name, 'modelId': name, 'author': name.split('/')[0], 'sha': oid, 'lastModified': DATE,
            'createdAt': DATE, 'private': repo.private, 'gated': False, 'disabled': False, 'tags': [], 'downloads': 0,
            'likes': 0, 'siblings': [{'rfilename': path, 'size': len(f.data), **f.lfs} for path, f in files.items()]}

    def info(self, request: Request, repo: str, revision: str = 'main') -> Response:
        found = self.repo(request, repo)
        return answer(self.describe(repo, found, self.head(found, revision)))

    def refs(self, request: Request, repo: str) -> Response:
        found = self.repo(request, repo)
        branches, tags = (
            [{'name': name, 'ref': f'refs/{kind}/{name}', 'targetCommit': oid} for name, oid in refs.items()]
            for kind, refs in (('heads', found.branches), ('tags', found.tags)))
        return answer({'branches': branches, 'tags': tags, 'converts': []})

    def list_commits(self, request: Request, repo: str, revision: str) -> Response:
        commits = self.repo(request, repo).commits
        return answer([
            {'id': oid, 'title': c.title, 'message': '', 'authors': [], 'date': DATE}
            for oid, c in reversed(commits.items())])

    def create_branch(self, request: Request, repo: str, name: str) -> Response:
        self.writer(request, repo)
        found = self.repo(request, repo)
        if name in found.branches:
            raise Error(409, 'Conflict', f'Branch {name} exists already')
        start = (request.get_json(silent=True) or {}).get('startingPoint', 'main')
        found.branches[name] = self.head(found, start)
        return answer({})

    def create_tag(self, request: Request, repo: str, revision: str) -> Response:
        self.writer(request, repo)
        found, name = self.repo(request, repo), request.get_json()['tag']
        if name in found.tags:
            raise Error(409, 'Conflict', f'Tag {name} exists already')
        found.tags[name] = self.head(found, revision)
        return answer({})

    # -- uploads

    def preupload(self, request: Request, repo: str, revision: str) -> Response:
        self.writer(request, repo)
        found = self.repo(request, repo)
        there = found.commits[self.head(found, revision)].files
        files = []
        for path in (f['path'] for f in request.get_json()['files']):
            mode = 'lfs' if path.endswith(LFS_SUFFIXES) else 'regular'
            oid = {'oid': there[path].sha256 if mode == 'lfs' else there[path].blob_id} if path in there else {}
            files.append({'path': path, 'uploadMode': mode, 'shouldIgnore': False, **oid})
        return answer({'files': files})

    def lfs_batch(self, request: Request, repo: str) -> Response:
        self.writer(request, repo)
        objects = []
        for o in json.loads(request.get_data())['objects']:
            entry = {'oid': o['oid'], 'size': o['size']}
            if o['oid'] not in self.lfs:
                entry['actions'] = {
                    'upload': {'href': f'{request.host_url}lfs/{o["oid"]}', 'header': {}},
                    'verify': {'href': f'{request.host_url}lfs-verify', 'header': {}}}
            objects.append(entry)
        return answer({'transfer': 'basic', 'objects': objects})

    def lfs_put(self, request: Request, oid: str) -> Response:
        data = request.get_data()
        if hashlib.sha256(data).hexdigest() != oid:
            raise Error(400, 'BadRequest', 'The content has another sha256')
        self.lfs[oid] = data
        return answer(b'')

    def lfs_verify(self, request: Request) -> Response:
        if json.loads(request.get_data())['oid'] not in self.lfs:
            raise Error(404, 'EntryNotFound', 'No such object')
        return answer({})

    def commit(self, request: Request, repo: str, revision: str) -> Response:
        self.writer(request, repo)
        found = self.repo(request, repo)
        head = self.head(found, revision)
        files, title = dict(found.commits[head].files), ''
        for line in request.get_data().splitlines():
            operation = json.loads(line)
            kind, value = operation['key'], operation['value']
            path = value.get('path', '')
            if path.startswith('/') or '..' in path.split('/'):
                raise Error(400, 'BadRequest', f'Invalid path: {path}')
            if kind == 'header':
                title = value['summary']
                if value.get('parentCommit') not in (None, head):
                    raise Error(412, 'PreconditionFailed', 'The branch has moved on')
            elif kind == 'file':
                files[path] = File(base64.b64decode(value['content']), False)
            elif kind == 'lfsFile':
                if value['oid'] not in self.lfs:
                    raise Error(400, 'BadRequest', f'{path} has not been uploaded')
                files[path] = File(self.lfs[value['oid']], True)
            elif kind == 'deletedFile':
                files.pop(path, None)
            elif kind == 'deletedFolder':
                files = {k: v for k, v in files.items() if not k.startswith(path.rstrip('/') + '/')}
        oid = found.add(revision, title, files)
        url = f'{request.host_url}{repo}/commit/{oid}'
        return answer({'success': True, 'commitOid': oid, 'commitUrl': url, 'hookOutput': ''})

    # -- downloads

    def entries(self, files: Dict[str, File]) -> List[Dict[str, object]]:
        return [
            {'type': 'file', 'oid': f.blob_id, 'size': len(f.data), 'path': path, **f.lfs} for path, f in files.items()]

    def tree(self, request: Request, repo: str, revision: str, folder: str = '') -> Response:
        found = self.repo(request, repo)
        files = found.commits[self.head(found, revision)].files
        prefix = f'{folder}/' if folder else ''
        recursive = request.args.get('recursive', '').lower() in ('1', 'true')
        inside = {path: f for path, f in files.items() if path.startswith(prefix)}
        flat = {path: f for path, f in inside.items() if '/' not in path.removeprefix(prefix)}
        folders = {prefix + path.removeprefix(prefix).split('/')[0] for path in inside.keys() - flat.keys()}
        listed = self.entries(inside if recursive else flat)
        return answer(listed + [{'type': 'directory', 'oid': '0' * 40, 'size': 0, 'path': path} for path in folders])

    def paths_info(self, request: Request, repo: str, revision: str) -> Response:
        found = self.repo(request, repo)
        files = found.commits[self.head(found, revision)].files
        wanted = request.form.getlist('paths') or (request.get_json(silent=True) or {}).get('paths', [])
        return answer(self.entries({path: files[path] for path in wanted if path in files}))

    def resolve(self, request: Request, repo: str, revision: str, path: str) -> Response:
        found = self.repo(request, repo)
        oid = self.head(found, revision)
        file = found.commits[oid].files.get(path)
        if file is None:
            raise Error(404, 'EntryNotFound', f'{path} is not in {repo}', X_Repo_Commit=oid)
        response = answer(file.data, X_Repo_Commit=oid)
        response.set_etag(file.sha256 if file.is_lfs else file.blob_id)
        if file.is_lfs:
            response.headers['X-Linked-Etag'] = f'"{file.sha256}"'
            response.headers['X-Linked-Size'] = str(len(file.data))
        return response.make_conditional(request, accept_ranges=True, complete_length=len(file.data))


def spoil(response: Response, fault: str) -> Response:
    """Apply a fault to the second half of a response."""
    data = response.get_data()
    half = len(data) // 2
    if fault == 'truncate':
        response.set_data(data[:half])
    elif fault == 'corrupt':
        response.set_data(data[:half] + bytes([data[half] ^ 0xff]) + data[half + 1:])
    else:
        def stop() -> Iterator[bytes]:
            yield data[:half]
            raise ConnectionAbortedError('fault: cut during a download')
        response.response = stop()
        response.headers['Content-Length'] = str(len(data))
    return response
