"""A whole update of pre-training, in CUDA graphs where there is a GPU: `GraphedStep`.

The host decides all that decides about shapes before a step (`MicroBatchPlanner`), copies it over in one piece and then starts
graphs: a few instead of hundreds of kernels. The front end's shapes are those of the audio, nearly always new: it runs eagerly.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Optional

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from hubert_fast.models.capacities import Capacities, Capacity
from hubert_fast.models.capture import CudaCapture
from hubert_fast.models.gradient_buffers import GradientBuffers
from hubert_fast.models.graphed_step_checks import check_objective, check_optimizer, check_settings, check_update
from hubert_fast.models.masking import MaskGenerator
from hubert_fast.models.micro_batch import MicroBatch, MicroBatchPlanner
from hubert_fast.models.objective import PretrainingObjective, mean_of
from hubert_fast.models.optimizer_step import OptimizerStep
from hubert_fast.models.plain import is_plain
from hubert_fast.models.plan_tensors import PlanTensors
from hubert_fast.models.stage_pass import PassTensors, Piece, StagePass
from hubert_fast.models.stages import encoder_stages, front_end_parameters, head_parameters
from hubert_fast.models.transformer import Seeds
from hubert_fast.models.weight_copies import WeightCopies

_log = logging.getLogger(__name__)


class UpdateResult(NamedTuple):
    """Loss, counts and gradient norm of an update of `GraphedStep`: scalars on the device.

    All are float64 and of this process's micro-batches, but ``gradient_norm``.
    """

    loss: Tensor  # what `PretrainingLoss` calls so, summed over the micro-batches, as the next six
    masked_count: Tensor
    masked_correct: Optional[Tensor]  # None where masked frames have no weight
    masked_loss: Optional[Tensor]
    unmasked_count: Optional[Tensor]  # None, as the next two, where unmasked frames have no weight
    unmasked_correct: Optional[Tensor]
    unmasked_loss: Optional[Tensor]
    feature_penalty: Tensor  # mean over the micro-batches, weighted with their masked frames
    gradient_norm: Tensor  # float32: of all processes, before clipping

    @property
    def mean(self) -> Tensor:
        """``loss`` over the masked frames of this process, or over 1 where there is none. No host waits for it."""
        return mean_of(self.loss, self.masked_count)


class GraphedStep:
    """Takes the micro-batches of an update through forward, backward, clipping and the optimizer's step.

    On a GPU the packed encoder, the loss and their backward run in CUDA graphs, one set for each capacity: a capacity runs
    eagerly the first time, and is captured once every layer has run. A batch that fits no capacity, and every batch on a
    CPU, runs the same stages eagerly, to the same numbers. Gradients of parameters lie at fixed places; those of a layer
    that LayerDrop left out of all micro-batches, on all processes, are None when the optimizer steps, so it leaves that
    layer alone.

    Settings of the objective are read here: after changing ``requires_grad``, those of masks, weights of the loss, device or
    dtype, make another.

    Args:
        objective: on its device. Nothing may wrap it, and hooks on its parameters are not called.
        optimizer: over its parameters, any of torch's that needs no closure. Its step is captured where all of its state lies
            on the device, which ``fused=True`` and ``capturable=True`` ask for, and runs eagerly elsewhere.
        clip_norm: largest norm of all gradients of the mean loss over masked frames, positive; None: they are not clipped.
        capacities: sizes that batches are rounded up to. None: nothing is captured, and batches have their own sizes.
        autocast: dtype of forward passes, torch.bfloat16 or torch.float16 (no gradient is scaled); None: that of the weights.
            Autocast around the call is not looked at.
        process_group: of processes that train together, each with a `GraphedStep` of its own; their weights are made equal to
            those of the first. Gradients are summed, stage by stage while the backward goes on.
        reduce_dtype: dtype in which gradients are summed over processes, torch.float32 or torch.bfloat16.
        most_graphs: capacities that are captured at most; others run eagerly.

    Raises:
        ValueError: for an objective without weight on frames, parameters that two stages share or of more than one device or
            dtype, and settings out of range.
    """

    def __init__(
        self,
        objective: PretrainingObjective,
        optimizer: Optimizer,
        *,
        clip_norm: Optional[float] = None,
        capacities: Optional[Capacities] = None,
        autocast: Optional[torch.dtype] = None,
        process_group: Optional[dist.ProcessGroup] = None,
        reduce_dtype: torch.dtype = torch.float32,
        most_graphs: int = 32,
    ) -> None:
        check_objective(objective)
        check_optimizer(objective, optimizer)
        check_settings(clip_norm, capacities, autocast, reduce_dtype, most_graphs)
        self.planner = MicroBatchPlanner(objective, capacities)
        self._objective, self._capacities, self._autocast_dtype = objective, capacities, autocast
        self._group: Optional[dist.ProcessGroup] = None
        self._reduce_dtype, self._most_graphs = reduce_dtype, most_graphs
        self._host_group: Optional[dist.ProcessGroup] = None
        self._parameters = [each for each in objective.parameters() if each.requires_grad]
        self._device = self._parameters[0].device
        self._stages = encoder_stages(objective)
        self._layer_drop = objective.model.wav2vec2.encoder.transformer.layer_drop
        self._head, self._front = head_parameters(objective), front_end_parameters(objective)
        self._owned = [*(stage.owned for stage in self._stages), self._head, self._front]
        self._frozen = [each for each in objective.parameters() if not each.requires_grad]
        self._gradients = GradientBuffers([[each.parameter for each in stage] for stage in self._owned])
        self._copies = WeightCopies(self._owned[:-1], autocast)
        # A generator of another make may draw masks as it is called, on the host: a graph would repeat the first.
        captures = capacities is not None and is_plain(objective.model.mask_generator, MaskGenerator)
        self._capture = CudaCapture(self._device) if captures and self._device.type == "cuda" else None
        self._optimizer = OptimizerStep(optimizer, self._parameters, clip_norm, self._capture)
        # The six sums of `FrameLosses`, and the penalty times the masked frames.
        self._sums = torch.zeros(7, dtype=torch.float64, device=self._device)
        weights = [0, 0, objective.masked_weight, 0, 0, objective.unmasked_weight, objective.feature_weight]
        self._weights = torch.tensor(weights, dtype=torch.float64, device=self._device)
        self._scale = torch.ones((), dtype=torch.float64, device=self._device)
        self._scale_on_host = 1.0
        seeds = objective.model.wav2vec2.encoder.transformer.seed_count
        self._seeds = torch.zeros(seeds, dtype=torch.int64, device=self._device)
        self._rows: Optional[Tensor] = None
        self._programs: dict[tuple[Capacity, bool, bool], _Program] = {}
        self._said_full = self._said_too_large = False
        self._pointers = self._where_parameters_lie()
        self._pending: list[tuple[dist.Work, Tensor, Tensor]] = []
        self._agreed_on_use: frozenset[int] = frozenset()
        if process_group is not None:
            self.join(process_group)

    def __call__(self, micro_batches: Sequence[MicroBatch], *, masked_frames: Optional[float] = None) -> UpdateResult:
        """One update: the optimizer's step on the gradient of the loss per masked frame.

        Args:
            micro_batches: one or more, made by ``planner``.
            masked_frames: of all micro-batches of all processes. None: they are counted here.

        Raises:
            ValueError: for anything but a list of one or more micro-batches that the step has room for.
            RuntimeError: where other parameters are trained than when this was made.
        """
        taking_part = self._accumulate(micro_batches, masked_frames, reduce=self._group is not None)
        self._gradients.give(taking_part)
        norm = self._optimizer(taking_part)
        sums = self._sums.clone()
        count, masked_correct, masked_loss, unmasked_count, unmasked_correct, unmasked_loss, penalty = sums.unbind()
        masked = (masked_correct, masked_loss) if self._objective.masked_weight else (None, None)
        unmasked = (unmasked_count, unmasked_correct, unmasked_loss) if self._objective.unmasked_weight else (None,) * 3
        penalty = penalty / count.clamp(min=1.0)
        return UpdateResult(sums @ self._weights, count, *masked, *unmasked, penalty, norm)

    def gradients(
        self, micro_batches: Sequence[MicroBatch], *, masked_frames: Optional[float] = None, every_layer: bool = False
    ) -> None:
        """Forward and backward alone: the gradients of this process's micro-batches become ``grad`` of the parameters.

        They are those of the loss over ``masked_frames`` (None: those of the micro-batches; 1: the loss is a sum).
        ``every_layer`` leaves out none, whatever LayerDrop draws: so it shows how much memory a step may take.
        """
        self._gradients.give(self._accumulate(micro_batches, masked_frames, reduce=False, every_layer=every_layer))

    def reset(self) -> None:
        """Drop all graphs and their memory, as after changing a dropout. Weights, optimizer and gradients stay."""
        self._programs.clear()
        self._optimizer.forget()
        self._rows = None
        self._copies = WeightCopies(self._owned[:-1], self._autocast_dtype)
        self._pointers = self._where_parameters_lie()
        self._stages = encoder_stages(self._objective)
        self._layer_drop = self._objective.model.wav2vec2.encoder.transformer.layer_drop
        if self._capture is not None:
            self._capture.renew()

    def _accumulate(
        self,
        micro_batches: Sequence[MicroBatch],
        masked_frames: Optional[float],
        *,
        reduce: bool,
        every_layer: bool = False,
    ) -> frozenset[int]:
        """Gradients of the micro-batches, in their buffers; returns the stages that have some."""
        check_update(micro_batches, masked_frames, self._capacities)
        self._require_same_parameters()
        transformer = self._objective.model.wav2vec2.encoder.transformer
        if self._pointers != self._where_parameters_lie() or self._layer_drop != transformer.layer_drop:
            self.reset()
        # All draws first, in the order in which a plain loop makes them.
        draws = [self._draw() for _ in micro_batches]
        if every_layer:
            draws = [(seeds, frozenset()) for seeds, _ in draws]
        last = len(self._stages) + 1
        here = frozenset(stage for stage in range(last + 1) if not all(stage in dropped for _, dropped in draws))
        if masked_frames is None:
            masked_frames = sum(each.masked_frames for each in micro_batches)
            masked_frames, taking_part = self._agree(masked_frames, here) if reduce else (masked_frames, here)
        elif reduce and any(stage.skippable for stage in self._stages):
            _, taking_part = self._agree(0, here)
        else:
            taking_part = here
        self._scale_on_host = 1.0 / max(1.0, masked_frames)
        self._scale.fill_(self._scale_on_host)
        self._sums.zero_()
        self._copies.refresh()
        overwrite = len(micro_batches) == 1
        self._gradients.zero(taking_part - here if overwrite else taking_part)
        for i, (batch, (seeds, dropped)) in enumerate(zip(micro_batches, draws)):
            reduced = taking_part if reduce and i + 1 == len(micro_batches) else frozenset()
            self._run(batch, seeds, dropped, overwrite, reduced)
        if reduce:
            self._agree_on_use(taking_part)
        self._wait()
        return taking_part

    def _draw(self) -> tuple[Optional[Tensor], frozenset[int]]:
        """Seeds of a micro-batch, and the stages that LayerDrop leaves out of it."""
        encoder = self._objective.model.wav2vec2.encoder
        seeds = encoder.draw_seeds(self._device)
        drawn = encoder.transformer.draw_dropped_layers() if encoder.transformer.training else ()
        return seeds, frozenset(1 + layer for layer, is_dropped in enumerate(drawn) if is_dropped)

    def _run(
        self,
        batch: MicroBatch,
        seeds: Optional[Tensor],
        dropped: frozenset[int],
        overwrite: bool,
        reduced: frozenset[int],
    ) -> None:
        """Add the gradients of one micro-batch; those of stages in ``reduced`` are then complete here."""
        with torch.enable_grad(), self._autocast():
            features = self._front_end(batch)
        program = self._program(batch, features, seeds is not None)
        program.memory.copy_(batch.plan, non_blocking=True)
        if seeds is not None:
            self._seeds.copy_(seeds)
        with torch.no_grad():
            # Dead rows get the first frame: nothing reads them.
            torch.index_select(features.flatten(0, 1), 0, program.tensors.gather, out=program.rows)
        pieces, where = self._pieces(program, overwrite, batch.fits, dropped)
        with where:
            for piece in pieces:
                (piece.skip if piece.stage in dropped and piece.skip is not None else piece.run)()
                for stage in piece.complete:
                    if stage in reduced:
                        self._reduce(stage)
        self._front_end_backward(features, program, batch, overwrite)
        if len(self._stages) + 1 in reduced:
            self._reduce(len(self._stages) + 1)

    def _front_end(self, batch: MicroBatch) -> Tensor:
        """Features of the audio, ``[batch, frames, channels]``, whose penalty is added to the sums."""
        waveforms, samples = batch.waveforms.to(self._device, non_blocking=True), batch.valid_samples
        if samples is not None:
            samples = samples.to(self._device, non_blocking=True)
        features, _ = self._objective.model.wav2vec2.feature_extractor(waveforms, samples)
        with torch.no_grad():
            # A norm of all values at once loses digits on a CPU, so each frame has its own first.
            frames = torch.linalg.vector_norm(features, dim=2, dtype=torch.promote_types(features.dtype, torch.float32))
            norm = torch.linalg.vector_norm(frames)
            self._sums[6].addcmul_(norm, norm, value=batch.masked_frames / features.numel())
        return features

    def _front_end_backward(self, features: Tensor, program: _Program, batch: MicroBatch, overwrite: bool) -> None:
        if program.rows_gradient is None:
            return
        objective, valid = self._objective, batch.valid_frames
        wide = torch.promote_types(features.dtype, torch.float32)
        # The penalty's gradient over the feature, rounded step by step as autograd does: a plain loop gives the same bits.
        slope = torch.tensor(self._scale_on_host, dtype=wide) * batch.masked_frames * objective.feature_weight
        slope = 2.0 * (slope / features.numel()).item()
        with torch.no_grad():
            gradient, gather = features * slope, program.tensors.gather[:valid]
            rows = gradient.flatten(0, 1).index_select(0, gather).add_(program.rows_gradient[:valid])
            gradient.flatten(0, 1).index_copy_(0, gather, rows)
            if objective.model.feature_grad_mult is not None:
                gradient.mul_(objective.model.feature_grad_mult)
        parameters = [each.parameter for each in self._front]
        found = torch.autograd.grad(features, parameters, gradient, allow_unused=True)
        self._gradients.collect(len(self._stages) + 1, found, overwrite=overwrite)

    def _program(self, batch: MicroBatch, features: Tensor, with_seeds: bool) -> _Program:
        """The program of the batch's capacity; one of its own where it has no capacity."""
        key = batch.capacity, with_seeds, self._objective.model.wav2vec2.encoder.transformer.training
        if batch.fits and key in self._programs:
            return self._programs[key]
        rows, channels = batch.capacity.rows, features.shape[2]
        if not batch.fits:
            memory = features.new_empty(2, rows, channels)
        else:
            if self._rows is None or self._rows.dtype != features.dtype:
                self._rows = features.new_empty(2, self._capacities.largest_rows, channels)
            memory = self._rows
        seeds = Seeds.of(self._seeds) if with_seeds else Seeds()
        wants_gradient = features.requires_grad
        program = _Program(batch, memory[0, :rows], memory[1, :rows] if wants_gradient else None, seeds)
        if batch.fits:
            self._programs[key] = program
        return program

    def _pieces(
        self, program: _Program, overwrite: bool, fits: bool, dropped: frozenset[int]
    ) -> tuple[Iterable[Piece], contextlib.AbstractContextManager[None]]:
        """The pieces of a pass, and the context to run them in."""
        if self._capture is not None and not fits and not self._said_too_large:
            self._said_too_large = True
            _log.warning("a batch of %s fits no capacity of %s and runs eagerly", program.capacity, self._capacities)
        if self._capture is None or not fits:
            return self._pass(program, overwrite).pieces(), contextlib.nullcontext()
        if overwrite in program.captured:
            return program.captured[overwrite], contextlib.nullcontext()
        # A stage that LayerDrop has left out so far may have kernels that are not compiled: a capture must not do that.
        run_before = program.run_before.setdefault(overwrite, set())
        if len(run_before) < len(self._stages) or self._is_full():
            run_before.update(set(range(len(self._stages))) - dropped)
            return self._pass(program, overwrite).pieces(), self._capture.ahead()
        program.captured[overwrite] = self._captured(program, overwrite)
        return program.captured[overwrite], contextlib.nullcontext()

    def _pass(self, program: _Program, overwrite: bool) -> StagePass:
        tensors = PassTensors(
            program.tensors.step_plan(program.capacity),
            program.rows,
            program.rows_gradient,
            program.seeds,
            self._scale,
            self._sums[:6],
        )
        return StagePass(
            self._objective,
            self._stages,
            self._head,
            tensors,
            self._gradients,
            self._copies,
            overwrite=overwrite,
            autocast=self._autocast,
        )

    def _captured(self, program: _Program, overwrite: bool) -> list[Piece]:
        """The pieces of a pass as graphs: one, where nothing comes between."""
        started = time.perf_counter()
        pieces = self._pass(program, overwrite).pieces()
        if self._group is None and not any(stage.skippable for stage in self._stages):
            captured = [Piece(self._capture(lambda: [piece.run() for piece in pieces]))]
        else:
            captured = [
                piece._replace(
                    run=self._capture(piece.run), skip=None if piece.skip is None else self._capture(piece.skip)
                )
                for piece in pieces
            ]
        _log.info(
            "captured a step of %d rows, %s of them kept, and %d sequences in %d pieces, %.1f s; %d of %d capacities",
            *program.capacity[:3],
            len(captured),
            time.perf_counter() - started,
            sum(bool(each.captured) for each in self._programs.values()) + (not program.captured),
            self._most_graphs,
        )
        return captured

    def _is_full(self) -> bool:
        full = sum(bool(each.captured) for each in self._programs.values()) >= self._most_graphs
        if full and not self._said_full:
            self._said_full = True
            _log.warning("most_graphs=%d capacities are captured; steps of others run eagerly", self._most_graphs)
        return full

    def _autocast(self) -> torch.autocast:
        # Without its cache: what a graph finds there would be a constant of it.
        dtype = self._autocast_dtype
        return torch.autocast(
            self._device.type, dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False
        )

    def _where_parameters_lie(self) -> list[tuple[int, tuple[int, ...]]]:
        return [(each.data_ptr(), each.stride()) for each in self._parameters]

    def _require_same_parameters(self) -> None:
        """Refuse a model whose parameters were replaced, frozen or unfrozen since: training would go on with the old ones."""
        same = all(
            each.parameter.requires_grad and each.parameter is module._parameters.get(name)
            for stage in self._owned
            for each in stage
            for module, name in each.places
        )
        if not same or any(each.requires_grad for each in self._frozen):
            raise RuntimeError(
                "objective has other trained parameters than when this GraphedStep was made, as after "
                "load_state_dict(assign=True) or requires_grad_(): make another"
            )

    # Processes that train together

    def join(self, group: dist.ProcessGroup) -> None:
        """Train with the other processes of ``group`` from here on, which all call this; as ``process_group`` does."""
        if self._group is None:
            # What was captured alone may be one graph, which leaves no place between stages to sum gradients at.
            for program in self._programs.values():
                program.captured.clear()
        self._group, self._agreed_on_use = group, frozenset()
        ranks = dist.get_process_group_ranks(group)
        for parameter in self._objective.parameters():
            dist.broadcast(parameter.detach(), src=ranks[0], group=group)
        self._host_group = _between_hosts(group)

    def _agree(self, masked_frames: float, here: frozenset[int]) -> tuple[float, frozenset[int]]:
        """The sum of ``masked_frames`` and the union of ``here`` over all processes."""
        flags = [float(stage in here) for stage in range(len(self._stages) + 2)]
        total = torch.tensor([masked_frames, *flags], dtype=torch.float64)
        dist.all_reduce(total, group=self._host_group)
        masked_frames, *counts = total.tolist()
        return masked_frames, frozenset(stage for stage, count in enumerate(counts) if count)

    def _agree_on_use(self, taking_part: frozenset[int]) -> None:
        """Learn which parameters another process has a gradient for: LayerDrop may have spared this one a stage so far.

        Once for each stage: that decides whether an optimizer steps a parameter, which all must do alike.
        """
        if taking_part <= self._agreed_on_use:
            return
        self._agreed_on_use |= taking_part
        used = torch.tensor([flag for stage in self._gradients.used for flag in stage], dtype=torch.uint8)
        dist.all_reduce(used, op=dist.ReduceOp.MAX, group=self._host_group)
        flags = iter(used.bool().tolist())
        self._gradients.used = [[next(flags) for _ in stage] for stage in self._gradients.used]

    def _reduce(self, stage: int) -> None:
        """Begin to sum the gradients of a stage over all processes."""
        flat = self._gradients.flat[stage]
        if flat.numel() == 0:
            return
        sent = flat if flat.dtype == torch.float64 else flat.to(self._reduce_dtype)
        self._pending.append((dist.all_reduce(sent, group=self._group, async_op=True), flat, sent))

    def _wait(self) -> None:
        """Let what follows on the device wait for the sums."""
        for work, flat, sent in self._pending:
            work.wait()
            if sent is not flat:
                flat.copy_(sent)
        self._pending.clear()


def _between_hosts(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same processes that sums counts between hosts, so that nothing waits for a GPU."""
    if dist.get_backend(group) == "gloo":
        return group
    ranks = dist.get_process_group_ranks(group)
    if len(ranks) == dist.get_world_size():
        return dist.new_group(backend="gloo")
    # Of these alone, so others need not call it; its name counts the groups of a process, of which all must have as many.
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)


class _Program:
    """Memory and graphs of one capacity."""

    def __init__(self, batch: MicroBatch, rows: Tensor, rows_gradient: Optional[Tensor], seeds: Seeds) -> None:
        self.capacity, self.rows, self.rows_gradient, self.seeds = batch.capacity, rows, rows_gradient, seeds
        self.memory = torch.empty_like(batch.plan, device=rows.device)
        self.tensors = PlanTensors.in_memory(self.memory, batch.capacity, batch.masked_channels)
        # By whether gradients are overwritten.
        self.run_before: dict[bool, set[int]] = {}  # the stages that have run
        self.captured: dict[bool, list[Piece]] = {}
