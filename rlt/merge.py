# SPDX-License-Identifier: MIT
"""
Merge an adapter into its base: a plain Hugging Face folder, for tools that know no adapters.

    python -m rlt.merge runs/teacher --out runs/teacher-merged
    python -m rlt.merge runs/teacher --bits 16 --out runs/teacher-merged

Training never merges: 16-bit weights are rounded after the sum, so small updates of an adapter can be lost.
"""

from pathlib import Path

from rlt import flags, models, saving
from rlt.checkpoints import write_folder
from rlt.errors import UserError

import torch

from rewards import equal_but_for_rounding


def merge(name, out, bits):
    """Write the model, its adapter added to its weights, into the new folder `out`. bits: 32 or 16 of each weight.

    Raises UserError where the model has no adapter, or one that can't be merged, or the folder exists.
    """
    if out.exists():
        raise UserError(f"{out} exists already: delete it, or pass another --out.")
    folder = models.resolve(name)
    if models.base_of(folder) == folder:
        raise UserError(f"{name} has no adapter: it can be used as it is.")
    tokenizer = models.load_tokenizer(name)
    model = _merged(name, models.load_model(name, bits=32, device=torch.device("cpu")))  # summed in float32
    model = model.to(torch.float32 if bits == 32 else torch.bfloat16)
    write_folder(out, lambda path: saving.save_model(model, tokenizer, path))


def _merged(name, model):
    """The base with the adapter in its weights. Raises UserError unless it computes what the two computed."""
    if not hasattr(model, "merge_and_unload"):
        raise UserError(f"{name} holds an adapter of type {model.active_peft_config.peft_type.value}, which can't be "
                        "merged: use it as it is, with its base.")
    wanted = _logits(model)
    _untie_head(model.get_base_model())
    with models.user_errors(f"{name} can't be merged, use it as it is, with its base"):
        merged = model.merge_and_unload()
    if not equal_but_for_rounding(_logits(merged), wanted, 1e-3, 1e-3, torch.float32):
        raise UserError(f"{name} can't be merged: the base with the adapter in its weights computes something else. "
                        "Use it as it is, with its base.")
    return merged


def _untie_head(base):
    """Give the head weights of its own where an adapter is on one of the two, embeddings and head, that share them."""
    embeddings, head = (list(part.parameters()) for part in (base.get_input_embeddings(), base.get_output_embeddings()))
    shared = {id(p) for p in embeddings} & {id(p) for p in head}
    if len(embeddings) == len(head) == 1:  # no adapter
        return
    for module in base.get_output_embeddings().modules():
        if id(module._parameters.get("weight")) in shared:
            module.weight = torch.nn.Parameter(module.weight.clone(), requires_grad=False)
            base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False


@torch.no_grad()
def _logits(model):
    """The logits of some tokens, (64, V)."""
    rows = model.get_input_embeddings().weight.shape[0]
    return model(input_ids=torch.arange(64)[None] * rows // 64).logits[0]


def main():
    parser = flags.make_parser(__doc__)
    parser.usage = "python -m rlt.merge MODEL --out FOLDER [flags]"
    parser.add_argument("model", type=flags.path, metavar="MODEL", help="a run folder or a folder with an adapter")
    parser.add_argument("--bits", type=int, choices=(32, 16), default=32, help="of each weight: float32 or bfloat16")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to make")
    args = parser.parse_args()
    merge(args.model, args.out, args.bits)
    print(f"{args.out} holds {args.model}, merged.")


if __name__ == "__main__":
    main()
