"""Export of the weights that are included in the package."""
import hashlib
import json
import shutil

import pytest
import yaml
from safetensors import safe_open
from small_study import TINY, pretend

from reproduction import experiment, shipping
from reproduction.protocol import Run, read_protocol
from reproduction.report import FOLDER
from reproduction.results import write_json
from timm_spikformer.pretrained import WEIGHTS_FOLDER

MODEL = TINY['defaults']['model']


def test_shipped_weights(study, tmp_path, monkeypatch):
    """Runs use initial weights from the package if the same settings have trained them."""
    text = {**TINY, 'cells': {**TINY['cells'], 'mae': {**TINY['cells']['mae'], 'ships': f'{MODEL}.mae_y'}}}
    (tmp_path / 'protocol.yaml').write_text(yaml.safe_dump(text))
    study = study._replace(protocol=read_protocol(tmp_path / 'protocol.yaml'))
    cell, folder = study.protocol.cells['mae'], tmp_path / 'weights'
    folder.mkdir()
    other = f'{"0123" * 16}  other.safetensors\n'
    (folder / 'SHA256SUMS').write_text(other)
    with pytest.raises(ValueError, match='The result of mae is missing'):
        shipping.ship(study, folder)
    assert sorted(folder.iterdir()) == [folder / 'SHA256SUMS']
    run = study.final_runs(cell)[0]
    study.execute(run)
    shipping.ship(study, folder)
    file = folder / f'{MODEL}.mae_y.safetensors'
    assert (folder / 'SHA256SUMS').read_text() == (
        f'{other}{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n')
    note = yaml.safe_load(file.with_suffix('.yaml').read_text())
    assert note['command'] == (
        'python -m reproduction run --only mae --seeds 0 --runs repeated_runs') and note['epochs'] == 3
    assert note['loss'] == 'mean squared error of masked patches, normalized per patch'
    with safe_open(file, 'pt') as f:
        assert json.loads(f.metadata()['autoencoder'])['decoder_embed_dim'] == 64
        assert json.loads(f.metadata()['model_args'])['time_steps'] == 1

    before = {path: path.read_bytes() for path in folder.iterdir()}
    for _ in range(3):  # safetensors writes the metadata in random order
        shipping.ship(study, folder)
        assert before == {path: path.read_bytes() for path in folder.iterdir()}

    shutil.rmtree(study.checkpoints)
    assert not study.has_weights(run)
    monkeypatch.setattr(experiment, 'WEIGHTS_FOLDER', folder)
    assert study.has_weights(run) and not study.has_weights(study.final_runs(cell)[1])
    tuned = Run(study.protocol.cells['tuned'], 0, 0, False)
    study.train(tuned, study.read_data(tuned))
    pretend(study, tuned)
    assert yaml.safe_load(shipping._format_training_args(study, tuned))['initialized_from'] == 'mae (masked)'
    assert [path.name for path in study.checkpoints.iterdir()] == [study.protocol.digest(tuned)]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    for damaged in (content, content[:1000]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match='mae_y.safetensors is damaged: its sha256 is not'):
            study.has_weights(run)
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    cell.recipe['lr'] = 0.5
    assert not study.has_weights(run)


def test_training_args_match_committed_runs(study):
    """The training arguments in the package match the protocol and the committed results."""
    study = study._replace(protocol=read_protocol(), runs=FOLDER / 'runs')
    cells = [cell for cell in study.protocol.cells.values() if cell.ships is not None]
    assert len(cells) == 4
    for cell in cells:
        packaged = (WEIGHTS_FOLDER / f'{cell.ships}.yaml').read_text()
        assert packaged == shipping._format_training_args(study, study.final_runs(cell)[0])


def test_failed_export_changes_nothing(study, tmp_path):
    """Otherwise, SHA256SUMS would not match the weights that were written before the error."""
    cells = study.protocol.cells
    for name in ('mae', 'scratch'):
        cells[name] = cells[name]._replace(ships=f'{MODEL}.{name}')
    run = study.final_runs(cells['mae'])[0]
    study.execute(run)
    with pytest.raises(ValueError, match='The result of scratch is missing'):
        shipping.ship(study, tmp_path / 'weights')
    assert not (tmp_path / 'weights').exists()


def test_weights_of_another_training_do_not_ship(study, tmp_path, monkeypatch):
    cells = study.protocol.cells
    cells['mae'] = cells['mae']._replace(ships=f'{MODEL}.mae')
    run = study.final_runs(cells['mae'])[0]
    result = study.execute(run)
    package = study._replace(checkpoints=tmp_path / 'empty')  # has the weights in the package only
    replace = shipping.replace_file

    def interrupt(path, content):
        replace(path, content)
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, 'WEIGHTS_FOLDER', tmp_path)
    monkeypatch.setattr(shipping, 'replace_file', interrupt)
    with pytest.raises(KeyboardInterrupt):
        shipping.ship(study, tmp_path)
    with pytest.raises(ValueError, match='is damaged'):
        package.has_weights(run)
    monkeypatch.undo()
    monkeypatch.setattr(experiment, 'WEIGHTS_FOLDER', tmp_path)
    shipping.ship(study, tmp_path)  # completes the interrupted export
    assert package.has_weights(run)

    result['test']['loss'] *= 1.01
    write_json(study.result_path(run), result)
    with pytest.raises(ValueError, match='have a test loss of .*, but the result says .* have been replaced'):
        shipping.ship(study, tmp_path)
    shutil.rmtree(study.checkpoints)
    with pytest.raises(ValueError, match='The weights of mae are not in .*execute the run again'):
        shipping.ship(study, tmp_path)
