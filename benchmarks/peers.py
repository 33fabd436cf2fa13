"""The same work in other libraries, where they are installed: PyTorch with transformers, Opacus, jax_privacy.

On a GPU, PyTorch's side runs there too. Shapes: S steps of a turn, B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxforget.data.tokens import IGNORED
from jaxforget.models import gpt2
from jaxforget.training.objectives import next_token
from jaxforget.training.optimizer import OptimizerConfig

Turn = Callable[[], np.ndarray]  # runs the steps of a turn and returns their losses, (S,)
_PLAIN_GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # no dropout, as here


def torch_device() -> str | None:
    """Name PyTorch's device that is JAX's too; None where it, or transformers, is not installed or has none."""
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError:
        return None
    device = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend())
    return None if device == "cuda" and not torch.cuda.is_available() else device


def torch_steps(torch, moving, loss_of: Callable[[Any], Any], batches: Sequence, train: OptimizerConfig) -> Turn:
    """Make a turn of steps in PyTorch, one a batch, by its fused AdamW at a constant rate. It returns losses_S."""
    optimizer = torch.optim.AdamW(moving.parameters(), lr=train.learning_rate, betas=(train.b1, train.b2),
                                  eps=train.epsilon, weight_decay=train.weight_decay, fused=True)  # fmt: skip

    def turn() -> np.ndarray:
        losses = []
        for batch in batches:
            optimizer.zero_grad()
            loss = loss_of(batch)
            loss.backward()
            if train.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(moving.parameters(), train.max_grad_norm)
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses).cpu().numpy()  # waits for the device

    return turn


def torch_training(
    weights: Path, token_SBT: np.ndarray, label_SBT: np.ndarray, dtype: str, train: OptimizerConfig, *, compile_: bool
) -> Turn:
    """Make a turn of next-token training on a saved GPT-2: eager, or the model compiled. It returns losses_S, nats.

    dtype: of activations, by autocast where not float32; parameters and losses are float32.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # of reading weights
    logging.set_verbosity_error()  # no row is padded, and token 0 is one like others
    device, half = torch_device(), dtype != "float32"
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32, **_PLAIN_GPT2).to(device).train()
    forward = torch.compile(model) if compile_ else model
    batches = list(zip(torch.tensor(token_SBT).to(device), torch.tensor(label_SBT).to(device).long(), strict=True))

    def loss_of(batch):
        token_BT, label_BT = batch
        with torch.autocast(device, torch.bfloat16, enabled=half):
            logit_BTV = forward(input_ids=token_BT, use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logit_BTV.float().flatten(0, 1), label_BT.flatten(), ignore_index=IGNORED
        )

    return torch_steps(torch, model, loss_of, batches, train)


def opacus(shape: gpt2.Config, rows: int, length: int) -> dict[str, Callable[[], None]]:
    """Make float32 steps of Opacus and of torch alone, on transformers' GPT-2 with an untied head; {} if not installed.

    Opacus refuses a tied head.
    """
    device = torch_device()
    try:
        import torch
        import transformers
        from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
    except ImportError:
        return {}
    if device is None:
        return {}
    their = transformers.GPT2Config(**dataclasses.replace(shape, tie_word_embeddings=False).to_hf() | _PLAIN_GPT2)
    token_BT, label_BT = torch.randint(0, shape.vocab_size, (2, rows, length)).to(device)
    position_BT = torch.arange(length)[None].repeat(rows, 1).to(device)
    noise = dict(noise_multiplier=1.0, max_grad_norm=0.1, expected_batch_size=rows)

    def stepper(kind: str):
        model = transformers.GPT2LMHeadModel(their).to(device).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        if kind == "hooks":
            model, optimizer = GradSampleModule(model), DPOptimizer(optimizer, **noise)
        elif kind == "ghost":
            model = GradSampleModuleFastGradientClipping(model, max_grad_norm=0.1)
            optimizer = DPOptimizerFastGradientClipping(optimizer, **noise)

        def step() -> None:
            optimizer.zero_grad()
            logit_BTV = model(input_ids=token_BT, position_ids=position_BT).logits
            loss_BT = torch.nn.functional.cross_entropy(logit_BTV.mT, label_BT, reduction="none")
            if kind == "ghost":
                DPTensorFastGradientClipping(model, optimizer, loss_BT.mean(dim=1)).backward()
            else:
                loss_BT.mean().backward()
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()

        return step

    kinds = {"torch: plain": "plain", "torch: Opacus, hooks": "hooks", "torch: Opacus, ghost": "ghost"}
    return {name: stepper(kind) for name, kind in kinds.items()}


def jax_privacy(model, microbatch: int | None) -> Callable | None:
    """Return jax_privacy's clipped gradient f(params, batch) of our losses, without noise; None if not installed."""
    try:
        from jax_privacy import clipped_grad
    except ImportError:
        return None
    objective = next_token(model)

    def loss(params, one):
        return jnp.mean(objective({"model": params}, one, None))

    return clipped_grad(loss, l2_clip_norm=0.1, batch_argnums=1, keep_batch_dim=True, microbatch_size=microbatch)
