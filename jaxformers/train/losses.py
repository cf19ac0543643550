"""Losses over a batch, as sums: whoever sums over microbatches and devices gets the loss of the whole batch.

B batch, T time, C chunk of time, D model, V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxformers.models.adapters import at_places, combine, partition
from jaxformers.models.config import LayerKind, ModelConfig, longest_stack, plan_stacks
from jaxformers.models.decoder import (
    embed,
    gather_shared,
    hidden_states,
    make_context,
    make_stage,
    run_stacks,
    unembed,
)
from jaxformers.models.mtp import run_modules
from jaxformers.models.observe import Seen
from jaxformers.models.params import Params
from jaxformers.models.routing import MoEStats, concat_layers, each_layer
from jaxformers.models.runtime import Runtime
from jaxformers.train.config import LossConfig

Batch = Mapping[str, jax.Array]
HEAD = ("embed", "lm_head", "lm_head_b", "final_norm")
MTP = ("mtp", "positions", "embed_norm")  # what modules for multi-token prediction need beside the head


@flax.struct.dataclass
class Totals:
    """What a whole batch's sums are divided by: `weight` of its targets, and its `tokens` that are not padding."""

    weight: jax.Array
    tokens: jax.Array

    @classmethod
    def of(cls, batch: Batch) -> Totals:
        weight = jnp.maximum(batch["weights"].sum(), 1.0)
        return cls(weight, jnp.maximum((batch["segment_ids"] > 0).sum(), 1).astype(jnp.float32))


@flax.struct.dataclass
class Sums:
    """Sums over a batch's targets: negative log-likelihood in nats, logsumexp^2, hits of the likeliest token,
    weights; and over its tokens and sparse layers: the experts' losses, visits that were dropped, and load [sparse
    layers, E] (None without experts). mtp is the loss of multi-token prediction, a sum over microbatches alone (None
    where there is none). Where a batch has `sources` [B, S], a one for each row's, source_nll and source_weight [S] are
    nll and weight by source. seen is what layers showed of their inside, leaves [layers, ...] (None where nothing was
    asked for)."""

    nll: jax.Array
    z: jax.Array
    correct: jax.Array
    weight: jax.Array
    balance: jax.Array | None = None
    router_z: jax.Array | None = None
    dropped: jax.Array | None = None
    load: jax.Array | None = None
    mtp: jax.Array | None = None
    source_nll: jax.Array | None = None
    source_weight: jax.Array | None = None
    seen: Seen | None = None


def token_sums(logits: jax.Array, targets: jax.Array, weights: jax.Array, *, sources: jax.Array | None = None) -> Sums:
    """Sums over logits float32 [..., V], targets int32 [...] and weights float32 [...]; also by source where `sources`
    float32 [B, S] are given, and the first dim of the others is B."""
    lse = jax.nn.logsumexp(logits, axis=-1)
    if jax.sharding.get_abstract_mesh().manual_axes:
        # Inside a pipeline XLA's partitioner fails on taking from a split vocabulary; elsewhere taking is faster.
        chosen = jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0.0).sum(axis=-1)
    else:
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    correct = (logits.argmax(axis=-1) == targets).astype(jnp.float32)
    nll = (lse - chosen) * weights
    sums = Sums(nll.sum(), (jnp.square(lse) * weights).sum(), (correct * weights).sum(), weights.sum())
    if sources is None:
        return sums

    def by_source(a: jax.Array) -> jax.Array:
        return (sources * a.reshape(a.shape[0], -1).sum(axis=1, keepdims=True)).sum(axis=0)

    return sums.replace(source_nll=by_source(nll), source_weight=by_source(weights))


def lm_loss(
    params: Params,
    batch: Batch,
    totals: Totals,
    cfg: ModelConfig,
    runtime: Runtime,
    config: LossConfig,
    *,
    chunk: int | None = None,
) -> tuple[jax.Array, Sums]:
    """This microbatch's share of the loss to minimise, and its sums.

    Shares of all microbatches add up to the loss of the batch whose `totals` are given: cross-entropy and z-loss per
    weighted target, the experts' losses per token and sparse layer, and, for a batch that `columns.look_ahead` made,
    that of multi-token prediction, whose sparse layers are then among those. `chunk` is as `chunk_length` gives it.
    """
    params = gather_shared(params, cfg, runtime)
    if runtime.run_loss is not None:
        return _pipelined_loss(params, batch, totals, cfg, runtime, config, chunk=chunk)
    hidden = hidden_states(
        params,
        cfg,
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        places=batch.get("places"),
        runtime=runtime,
    )
    head = {name: params[name] for name in HEAD if name in params}
    loss, sums = head_loss(head, hidden.x, batch, cfg, runtime, z_weight=config.z_loss, chunk=chunk)
    loss, stats = loss / totals.weight, hidden.moe
    if _looks_ahead(batch):
        mtp, further = further_loss(params, hidden.x, batch, cfg, runtime, chunk=chunk)
        loss, stats, sums = loss + config.mtp_loss * mtp, concat_layers([stats, further]), sums.replace(mtp=mtp)
    if stats is not None:
        balance, router_z = expert_losses(stats, Totals.of(batch).tokens, config)
        loss += (config.balance_loss * balance + config.router_z_loss * router_z) / totals.tokens
    return loss, _with_experts(sums, stats, batch, config).replace(seen=hidden.seen)


def _looks_ahead(batch: Batch) -> bool:
    return "mtp_tokens" in batch


def further_loss(
    params: Params, x: jax.Array, batch: Batch, cfg: ModelConfig, runtime: Runtime, *, chunk: int | None
) -> tuple[jax.Array, MoEStats | None]:
    """The loss of multi-token prediction over the decoder's hidden states x [B, T, D], and the statistics of its sparse
    layers: cross-entropy, weighted as `columns.look_ahead` says, without a z-loss.
    """
    states, stats = run_modules(
        params,
        x,
        cfg,
        batch["mtp_tokens"],
        positions=batch["positions"],
        segment_ids=batch["mtp_segment_ids"],
        places=batch.get("places"),
        runtime=runtime,
    )
    losses = []
    for m, (p, y) in enumerate(zip(params["mtp"], states, strict=True)):
        head = {name: params[name] for name in HEAD if name in params} | {"final_norm": p["norm"]}
        rows = {name: batch[f"mtp_{name}"][..., m] for name in ("targets", "weights")}
        if "places" in batch:
            rows["places"] = batch["places"]
        losses.append(head_loss(head, y, rows, cfg, runtime, z_weight=0.0, chunk=chunk)[0])
    return sum(losses[1:], losses[0]), stats


def _with_experts(sums: Sums, stats: MoEStats | None, batch: Batch, config: LossConfig) -> Sums:
    if stats is None:
        return sums
    balance, router_z = expert_losses(stats, Totals.of(batch).tokens, config)
    return sums.replace(balance=balance, router_z=router_z, dropped=stats.dropped.sum(), load=stats.load)


def _expert_rates(totals: Totals, kinds: Sequence[LayerKind], config: LossConfig) -> MoEStats | None:
    """What a unit of each of a sparse layer's sums adds to the loss, where that is linear in them, of layers of these
    kinds."""
    layers = sum(kind.ffn == "moe" for kind in kinds)
    if not layers:
        return None
    assert config.balance_over == "row"
    per_token, zero = 1 / (totals.tokens * layers), jnp.zeros((), jnp.float32)
    return MoEStats(config.balance_loss * per_token, config.router_z_loss * per_token, zero, zero, zero)


def _pipelined_loss(
    params: Params,
    batch: Batch,
    totals: Totals,
    cfg: ModelConfig,
    runtime: Runtime,
    config: LossConfig,
    *,
    chunk: int | None,
) -> tuple[jax.Array, Sums]:
    """`lm_loss` where the runtime computes the longest stack, all behind it and their gradient in one go."""
    assert runtime.run_loss is not None
    stacks = plan_stacks(cfg.layers)
    k = longest_stack(stacks)
    ctx = make_context(cfg, runtime, batch["positions"], batch["segment_ids"])
    x = embed(params, cfg, batch["tokens"], batch["positions"], runtime)
    x, stats = run_stacks(params["layers"][:k], x, ctx, cfg, runtime)
    before = stats.moe
    run = make_stage(cfg, runtime, stacks[k])

    def stage(layers: Any, x: jax.Array, rows: Batch, active: jax.Array | None) -> tuple[jax.Array, MoEStats | None]:
        x, stats = run(layers, x, (rows["positions"], rows["segment_ids"]), active)
        return x, stats.moe

    def last(tail: Params, x: jax.Array, rows: Batch) -> tuple[jax.Array, MoEStats | None, Sums]:
        ctx = make_context(cfg, runtime, rows["positions"], rows["segment_ids"])
        x, behind = run_stacks(tail["layers"], x, ctx, cfg, runtime, first=k + 1)
        stats = behind.moe
        head = {name: tail[name] for name in HEAD if name in tail}
        loss, sums = head_loss(head, x, rows, cfg, runtime, z_weight=config.z_loss, chunk=chunk)
        if not ahead:
            return loss, stats, sums
        mtp, further = further_loss(tail, x, rows, cfg, runtime, chunk=chunk)
        return jnp.stack([loss, mtp]), concat_layers([stats, further]), sums.replace(mtp=mtp)

    ahead = _looks_ahead(batch)
    behind_stack = (*HEAD, *(MTP if ahead else ()))
    tail = {name: params[name] for name in behind_stack if name in params} | {"layers": params["layers"][k + 1 :]}
    rows = {name: a for name, a in batch.items() if name != "tokens"}
    rates = _expert_rates(totals, cfg.layers + (cfg.layers[-1:] * cfg.mtp_modules if ahead else ()), config)
    of_loss = jnp.stack([1 / totals.weight, jnp.float32(config.mtp_loss)]) if ahead else 1 / totals.weight
    loss, (own, behind, sums) = runtime.run_loss(stage, last, params["layers"][k], tail, x, rows, (of_loss, rates))
    if before is not None:
        assert rates is not None
        loss += rates.balance * before.balance.sum() + rates.router_z * before.router_z.sum()
    return loss, _with_experts(sums, concat_layers([before, each_layer(own), behind]), batch, config)


def expert_losses(stats: MoEStats, tokens: jax.Array, config: LossConfig) -> tuple[jax.Array, jax.Array]:
    """Load-balance loss and router z-loss, summed over this microbatch's `tokens` and averaged over sparse layers."""
    balance = stats.balance if config.balance_over == "row" else stats.batch_balance(tokens)
    return balance.mean(), stats.router_z.mean()


def eval_sums(
    params: Params, batch: Batch, *, cfg: ModelConfig, runtime: Runtime, config: LossConfig, chunk: int | None
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood in nats and weight, summed over a batch."""
    _, sums = lm_loss(params, batch, Totals.of(batch), cfg, runtime, config, chunk=chunk)
    return sums.nll, sums.weight


AUTO_LOGITS_BYTES = 2**30


def chunk_length(
    config: LossConfig, *, rows: int, length: int, vocab_size: int, devices: int, context_shards: int = 1
) -> int | None:
    """Tokens of each row whose logits exist at once; None = all of the row's.

    rows is a microbatch's, over all of `devices`. A chunk that does not divide the row is lowered to the next that
    does, and up to the smallest of which each of `context_shards`, among which a row is split, has a token.
    """
    if config.chunk == "none":
        return None
    chunk = max(AUTO_LOGITS_BYTES * devices // (4 * rows * vocab_size), 1) if config.chunk == "auto" else config.chunk
    if chunk >= length:
        return None
    fitting = (size for size in range(chunk, 0, -1) if length % size == 0 and size % context_shards == 0)
    return next(fitting, context_shards)


def head_loss(
    head: Params,
    x: jax.Array,
    batch: Batch,
    cfg: ModelConfig,
    runtime: Runtime,
    *,
    z_weight: float,
    chunk: int | None,
) -> tuple[jax.Array, Sums]:
    """Sum of cross-entropy and weighted z over hidden states x [B, T, D], and the sums behind it.

    With `chunk`, logits of so many tokens a row exist at once, and the gradient is taken chunk by chunk during the
    forward pass, so nothing is computed twice.
    """

    def part(
        head: Params, x: jax.Array, targets: jax.Array, weights: jax.Array, places: jax.Array | None = None
    ) -> tuple[jax.Array, Sums]:
        logits = unembed(at_places(head, places), cfg, x, runtime)
        sums = token_sums(logits, targets, weights, sources=batch.get("sources"))
        return sums.nll + z_weight * sums.z, sums

    x = runtime.shard(x, "batch", "seq", None)  # whole in time over tp, which splits the vocabulary here
    columns = [batch[name] for name in ("targets", "weights", "places") if name in batch]
    return part(head, x, *columns) if chunk is None else _chunked(part, chunk, head, x, columns)


def _chunked(part: Any, chunk: int, head: Params, x: jax.Array, columns: Sequence[jax.Array]) -> tuple[jax.Array, Sums]:
    """`part` of head, x [B, T, D] and columns [B, T], summed over chunks of time; its gradient is computed along with
    its value when it will be needed."""

    # Interleaved, as microbatches are: every device that holds a part of each row has a part of each chunk.
    def split(a: jax.Array) -> jax.Array:
        return jnp.moveaxis(a.reshape(a.shape[0], chunk, -1, *a.shape[2:]), 2, 0)

    def join(a: jax.Array) -> jax.Array:
        return jnp.moveaxis(a, 0, 2).reshape(x.shape)

    def add(total: Any, new: Any) -> Any:
        return jax.tree.map(jnp.add, total, new)

    @jax.custom_vjp
    def total(head: Params, x: jax.Array) -> tuple[jax.Array, Sums]:
        values = jax.lax.map(lambda piece: part(head, *piece), (split(x), *map(split, columns)))
        return jax.tree.map(lambda a: a.sum(axis=0), values)

    def forward(head: Params, x: Any) -> tuple[tuple[jax.Array, Sums], tuple[Params, jax.Array]]:
        # What of the head is not trained needs no gradient.
        whole, x = jax.tree.map(lambda leaf: leaf.value, head), x.value
        head, still = partition(whole, jax.tree.map(lambda leaf: leaf.perturbed, head))

        def step(carry: Any, piece: Any) -> tuple[Any, jax.Array]:
            x, *others = piece
            value, pull, sums = jax.vjp(lambda h, x: part(combine(h, still), x, *others), head, x, has_aux=True)
            d_head, d_x = pull(jnp.ones((), value.dtype))
            return add(carry, ((value, sums), d_head)), d_x

        zeros = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype), (jax.eval_shape(total, whole, x), jax.eval_shape(lambda h: h, head))
        )
        (values, d_head), d_x = jax.lax.scan(step, zeros, (split(x), *map(split, columns)))
        return values, (d_head, join(d_x))

    def backward(gradients: tuple[Params, jax.Array], cotangent: tuple[jax.Array, Sums]) -> tuple[Params, jax.Array]:
        scale = cotangent[0]
        return jax.tree.map(lambda g: (g.astype(jnp.float32) * scale).astype(g.dtype), gradients)

    total.defvjp(forward, backward, symbolic_zeros=True)
    return total(head, x)
