"""Run a script, unmodified, with the models registered: `python -m timm_spikformer SCRIPT ARGS`.

For timm's train.py, validate.py, inference.py, benchmark.py and onnx_export.py, transformers' run_mim.py,
run_image_classification.py and run_image_classification_no_trainer.py, and other scripts that create models by name.
It works under a launcher: `torchrun ... -m timm_spikformer SCRIPT ARGS`, `accelerate launch -m timm_spikformer SCRIPT
ARGS`, and the processes that the script starts know the models too.
"""
import os
import sys

from .launcher import run_script


def main() -> None:
    if sys.argv[1:2] in (['-h'], ['--help']):
        print(__doc__.strip())
        return
    if len(sys.argv) < 2:
        sys.exit('error: No script was given. Expected: python -m timm_spikformer SCRIPT ARGS')
    script = sys.argv[1]
    if not os.path.isfile(script):
        sys.exit(f'error: There is no script {script!r}. Expected: python -m timm_spikformer SCRIPT ARGS')
    if os.path.basename(script) == 'run_mae.py':
        # it names the classes of ViTMAE, and would train one without a word, whatever the checkpoint
        sys.exit('error: run_mae.py trains a ViTMAE, never a Spikformer. Pre-train with run_mim.py.')
    # as the interpreter does it: the script is argv[0], and its real folder comes first on the path
    del sys.argv[0]
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    run_script(script, '__main__')


if __name__ == '__main__':
    main()
