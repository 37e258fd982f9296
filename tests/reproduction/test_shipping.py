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


def test_shipped_weights(study, tmp_path, monkeypatch):
    """Runs use initial weights from the package if the same settings have trained them."""
    text = {**TINY, 'cells': {**TINY['cells'], 'mae': {**TINY['cells']['mae'], 'ships': 'x.mae_y'}}}
    (tmp_path / 'protocol.yaml').write_text(yaml.safe_dump(text))
    study = study._replace(protocol=read_protocol(tmp_path / 'protocol.yaml'))
    cell, folder = study.protocol.cells['mae'], tmp_path / 'weights'
    folder.mkdir()
    (folder / 'SHA256SUMS').write_text('0123  other.safetensors\n')
    with pytest.raises(ValueError, match='The result of mae is missing'):
        shipping.ship(study, folder)
    run = study.final_runs(cell)[0]
    study.execute(run)
    shipping.ship(study, folder)
    file = folder / 'x.mae_y.safetensors'
    assert (folder / 'SHA256SUMS').read_text() == (
        f'0123  other.safetensors\n{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n')
    note = yaml.safe_load(file.with_suffix('.yaml').read_text())
    assert note['command'] == 'python -m reproduction run --only mae --seeds 0' and note['epochs'] == 3
    with safe_open(file, 'pt') as f:
        assert json.loads(f.metadata()['autoencoder'])['decoder_embed_dim'] == 64
        assert json.loads(f.metadata()['model_args'])['time_steps'] == 1

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
        with pytest.raises(ValueError, match='x.mae_y.safetensors is damaged: its sha256 is not'):
            study.has_weights(run)
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    cell.recipe['lr'] = 0.5
    assert not study.has_weights(run)


def test_failed_export_changes_nothing(study, tmp_path):
    """Otherwise, SHA256SUMS would not match the weights that were written before the error."""
    cells = study.protocol.cells
    for name in ('mae', 'scratch'):
        cells[name] = cells[name]._replace(ships=f'x.{name}')
    run = study.final_runs(cells['mae'])[0]
    study.train(run, study.read_data(run))
    pretend(study, run)
    with pytest.raises(ValueError, match='The result of scratch is missing'):
        shipping.ship(study, tmp_path / 'weights')
    assert not (tmp_path / 'weights').exists()
