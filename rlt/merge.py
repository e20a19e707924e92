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


def merge(name, out, bits):
    """Write the model, its adapter added to its weights, into the new folder `out`. bits: 32 or 16 of each weight.

    Raises UserError where the model has no adapter, or the folder exists.
    """
    if out.exists():
        raise UserError(f"{out} exists already: delete it, or pass another --out.")
    folder = models.resolve(name)
    if models.base_of(folder) == folder:
        raise UserError(f"{name} has no adapter: it can be used as it is.")
    tokenizer = models.load_tokenizer(name)
    model = models.load_model(name, bits=32, device=torch.device("cpu")).merge_and_unload()  # summed in float32
    model = model.to(torch.float32 if bits == 32 else torch.bfloat16)
    write_folder(out, lambda path: saving.save_model(model, tokenizer, path))


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
