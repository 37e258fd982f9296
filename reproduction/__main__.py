"""Command line of the study: `python -m reproduction {run,run-one,status,report,ship}`."""
import argparse
import os
import signal
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError('the path is empty')
    return Path(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m reproduction', description='Run the study, or report its results.')
    commands = parser.add_subparsers(dest='command', required=True)
    run = commands.add_parser('run', help='execute the missing runs')
    run.add_argument(
        '--only', nargs='+', default=['*'], metavar='CELL', help='names of cells, or patterns such as pretrained-*')
    run.add_argument('--seeds', nargs='+', type=int, metavar='SEED', help='restrict the final runs to these seeds')
    run.add_argument('--jobs', type=int, default=1, metavar='N', help='number of processes, each with one thread')
    status = commands.add_parser('status', help='print the number of finished runs of each cell')
    one = commands.add_parser('run-one', help='execute one run, such as ssa/seed-0 or ssa/try-1')
    one.add_argument('name', metavar='RUN')
    one.add_argument('--weights-only', action='store_true', help='train the weights, and keep the existing result')
    ship = commands.add_parser('ship', help='write the weights that are included in the package')
    report = commands.add_parser('report', help='write README.md and the figures')
    report.add_argument(
        '--output', type=_path, metavar='DIR',
        help='folder for README.md and figures/ (default: reproduction/, if --protocol and --runs have their defaults)')
    for command in (run, status, one, ship, report):
        command.add_argument('--protocol', type=_path, default=FOLDER / 'protocol.yaml', metavar='YAML')
        command.add_argument('--runs', type=_path, default=FOLDER / 'runs', metavar='DIR', help='folder with results')
    for command in (run, one, ship):
        command.add_argument('--device', default='cpu', help='PyTorch device for training (default: cpu)')
    for command in (run, status, one, ship):
        command.add_argument(
            '--checkpoints', type=_path, default=FOLDER / 'checkpoints', metavar='DIR',
            help='folder with checkpoints')
        command.add_argument(
            '--data', type=_path, default=FOLDER / 'data', metavar='DIR', help='folder with datasets')
    return parser


def main() -> None:
    args = _parser().parse_args()
    from .protocol import read_protocol
    try:
        protocol = read_protocol(args.protocol)
        if args.command == 'report':
            from .report import write_report
            write_report(protocol, args.runs, _report_folder(args))
            return
        from timm_spikformer.devices import choose_device

        from .experiment import Study
        device = choose_device(getattr(args, 'device', 'cpu'))
        study = Study(protocol, args.runs, args.checkpoints, args.data, device)
        if args.command == 'run-one':
            _run_one(study, args.name, args.weights_only)
        elif args.command == 'ship':
            from .shipping import ship
            ship(study)
        elif args.command == 'status':
            _print_status(study)
        else:
            _run(study, args)
    except ValueError as e:
        sys.exit(f'error: {e}')
    except BrokenPipeError:  # the reader of the output, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as e:
        sys.exit(f'error: {e.filename or "a file"}: {e.strerror or e}')
    except KeyboardInterrupt:
        sys.exit('\nInterrupted. Run the same command again to continue.')


def _report_folder(args: argparse.Namespace) -> Path:
    if args.output is not None:
        return args.output
    if (args.protocol, args.runs) != (FOLDER / 'protocol.yaml', FOLDER / 'runs'):
        raise ValueError('A report of another protocol or other results requires --output.')
    return FOLDER


def _run(study, args: argparse.Namespace) -> None:
    from .schedule import run_missing
    if args.jobs < 1:
        raise ValueError(f'--jobs must be at least 1, got {args.jobs}.')
    signal.signal(signal.SIGTERM, lambda *args: sys.exit('Terminated.'))  # `run_missing` ends its processes on an exit
    options = [f'--{name}={getattr(args, name)}' for name in ('protocol', 'runs', 'checkpoints', 'data', 'device')]
    failed = run_missing(study, args.only, args.seeds, args.jobs, options)
    if failed:
        sys.exit(f'error: these runs failed, see above: {", ".join(failed)}')


def _run_one(study, name: str, weights_only: bool) -> None:
    for cell in study.protocol.cells.values():
        for run in [*study.tries(cell), *study.final_runs(cell)]:
            if run.name == name:
                if weights_only:
                    study.train(run, study.read_data(run))
                else:
                    study.execute(run)
                return
    raise ValueError(
        f'There is no run {name}, or it is a final run and not all tries of its cell have finished.')


def _print_status(study) -> None:
    if not study.runs.is_dir():
        raise ValueError(f'{study.runs} is not a folder with results.')
    for cell in study.protocol.cells.values():
        tries = study.tries(cell)
        done = [study.result(run) is not None for run in tries]
        final = [study.result(run) is not None for run in study.final_runs(cell)]
        counts = f'tries {f"{sum(done)}/{len(tries)}" if tries else "none"}   final runs {sum(final)}/{len(cell.seeds)}'
        print(f'{cell.name:<22} {counts}', flush=True)


if __name__ == '__main__':
    main()
