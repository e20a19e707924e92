"""
GRPO losses and gradients by two other implementations, for tests/test_grpo.py to compare grpo.py with.

    pip install --no-deps trl==1.16.0 liger-kernel==0.8.5      (beside this repository's requirements)
    python tests/golden/make_golden.py                        (writes tests/golden/grpo.json)

TRL's loss is a method of its trainer: a stand-in object has what that method reads and hands it log-probs.
Liger's starts from hidden states, so its gradient is the output head's. Both pad; the padding holds junk.
"""
import json
import logging
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from trl import GRPOTrainer

logging.disable(logging.WARNING)
LENGTHS, MAX_NEW_TOKENS = [5, 1, 3, 4], 6  # a sequence of one token, and none that fills max_new_tokens
EPSILON_LOW, EPSILON_HIGH = 0.2, 0.28
HIDDEN, VOCAB = 3, 7
B, T = len(LENGTHS), max(LENGTHS)


def trl_loss(loss, beta, logprobs, old, ref, mask, advantages):
    args = SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1)
    accelerator = SimpleNamespace(num_processes=1, sync_gradients=True, gather=lambda t: t,
                                  reduce=lambda t, reduction: t)
    metrics = defaultdict(list)
    trainer = SimpleNamespace(
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        importance_sampling_level="sequence" if loss == "gspo" else "token", beta=beta, args=args,
        loss_type="grpo" if loss == "gspo" else loss, epsilon_low=EPSILON_LOW, epsilon_high=EPSILON_HIGH,
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, accelerator=accelerator,
        max_completion_length=MAX_NEW_TOKENS, _entropy_bonus_enabled=False, _metrics={"train": metrics},
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, torch.zeros(B, T), None))
    prompt = torch.ones(B, 2, dtype=torch.long)
    total = GRPOTrainer._compute_loss(trainer, None, dict(
        prompt_ids=prompt, prompt_mask=prompt, completion_ids=mask.long(), completion_mask=mask,
        advantages=advantages, old_per_token_logps=old, ref_per_token_logps=ref,
        num_items_in_batch=mask.sum()))
    total.backward()
    return {"loss": total.item(), "grad_logprobs": logprobs.grad[mask.bool()].tolist(),
            "clip_ratio": metrics["clip_ratio/region_mean"][0], "kl": metrics["kl"][0] if beta else None}


def liger_loss(loss, beta, hidden, head, ids, old, ref, mask, advantages):
    fused = LigerFusedLinearGRPOLoss(
        beta=beta, compiled=False, use_ref_model=True, chunk_size=1, temperature=1.0,
        epsilon_low=EPSILON_LOW, epsilon_high=EPSILON_HIGH, max_completion_length=MAX_NEW_TOKENS,
        loss_type="grpo" if loss == "gspo" else loss,
        importance_sampling_level="sequence" if loss == "gspo" else "token")
    total, metrics = fused(hidden, head, ids, mask, advantages,
                           ref_per_token_logps=ref, old_per_token_logps=old)
    total.backward()
    return {"loss": total.item(), "grad_head": head.grad.tolist(), "clip_ratio": metrics[-1].item(),
            "kl": metrics[0].item() if beta else None}


torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
mask = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).double()
hidden, head = torch.randn(B, T, HIDDEN), torch.randn(VOCAB, HIDDEN)
ids = torch.randint(VOCAB, (B, T))
logprobs = (hidden @ head.T).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
shift = torch.tensor([[0.5], [-0.4], [0.1], [-0.1]])  # whole sequences, and single tokens, leave the range
old = torch.where(mask.bool(), logprobs - shift - 0.3 * torch.randn(B, T), 99.0)
ref = torch.where(mask.bool(), logprobs + 0.5 * torch.randn(B, T), -99.0)
advantages = torch.tensor([1.3, -0.7, -1.1, 0.5])

cases = [{"loss": loss, "beta": beta,
          "trl": trl_loss(loss, beta, logprobs.clone().requires_grad_(), old, ref, mask, advantages),
          "liger": liger_loss(loss, beta, hidden, head.clone().requires_grad_(), ids, old, ref, mask,
                              advantages)}
         for loss in ("grpo", "dapo", "dr_grpo", "gspo") for beta in (0.0, 0.04)]
real = mask.bool()
golden = {"lengths": LENGTHS, "max_new_tokens": MAX_NEW_TOKENS,
          "epsilon_low": EPSILON_LOW, "epsilon_high": EPSILON_HIGH, "advantages": advantages.tolist(),
          "hidden": hidden[real].tolist(), "head": head.tolist(), "ids": ids[real].tolist(),
          "old_logprobs": old[real].tolist(), "ref_logprobs": ref[real].tolist(), "cases": cases}
Path(__file__).with_name("grpo.json").write_text(json.dumps(golden) + "\n")
