"""One training loop for every stage. What a method does beside plain training is in its hooks (pipeline/hooks.py)."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from pipeline import distributed
from pipeline.config import Fit, Launch, Steps
from pipeline.errors import InputError
from pipeline.evaluation import evaluate
from pipeline.filters import strength
from pipeline.hooks import Hook, ParameterRule, Run, stable_seed
from pipeline.layers import convolutions, expanded
from pipeline.progress import Progress
from pipeline.resume import Resume
from pipeline.step import Step
from pipeline.tasks import check_options, share

CHECK_EVERY = 50  # steps between two looks at the loss: a look waits for the device


def train(run: Run, hooks: Sequence[Hook], resume: Resume | None = None, launch: Launch = "eager") -> nn.Module:
    """Train `run.model` as its fit and its hooks say, and return the final model in evaluation mode.

    With `resume`, the state is kept after every epoch and, every so many seconds, within one: a run that was killed goes on at
    the batch after it and ends, on the CPU with the same number of threads, bit for bit as an undisturbed one. `InputError` when
    the loss diverges.
    """
    check_options(run.task, run.stage, run.fit)
    distributed.share_of(min(run.fit.batch_size, run.train.count), f"{run.stage}.fit.batch_size")
    torch.manual_seed(stable_seed(run.seed, run.stage, "prepare"))
    for hook in hooks:
        run.notes += hook.coverage(run.model, run.input_shape)
        hook.prepare(run)
    _place(run)
    distributed.agree(run.model)
    run.rounds = _rounds(run.fit.epochs, hooks)
    step = Step(run, hooks, launch)
    if resume and resume.load(run, hooks):
        _begin_optimizer(run, hooks, step.graph)
        resume.load_optimizer(run)
    with Progress(run) as progress:
        _train_rounds(run, hooks, step, resume, progress)
    run.round = min(run.round, len(run.rounds))
    if run.best:
        run.model.load_state_dict(run.best)
    for hook in hooks:
        hook.finish(run)
    distributed.agree(run.model)
    return run.model.eval()


def _train_rounds(run: Run, hooks: Sequence[Hook], step: Step, resume: Resume | None, progress: Progress) -> None:
    run.round = max(run.round, 1)
    while run.round <= len(run.rounds):
        if run.round_epoch == run.step == 0:
            if not all([hook.begin_round(run) for hook in hooks]):
                return
            distributed.agree(run.model)
            _begin_optimizer(run, hooks, step.graph)
        while run.round_epoch < run.rounds[run.round - 1]:
            _train_epoch(run, hooks, step, resume, progress)
            final = (run.round, run.round_epoch) == (len(run.rounds), run.rounds[-1])
            if not final and any([hook.after_epoch(run) for hook in hooks]):
                run.round_epoch = run.rounds[run.round - 1]
            distributed.agree(run.model)
            if resume:
                resume.save(run, hooks)
        run.round += 1
        run.round_epoch = 0


def _train_epoch(run: Run, hooks: Sequence[Hook], step: Step, resume: Resume | None, progress: Progress) -> None:
    """One pass over the training images, or the rest of one, and one over the validation images; a row of history."""
    own = [distributed.rank()] if distributed.rank() else []  # dropout differs between the parts of a batch
    torch.manual_seed(stable_seed(run.seed, run.stage, "epoch", run.epoch, *own))
    if run.step and resume:
        resume.load_random(run)
    run.model.train()
    with distributed.synchronised(run.model, run.device):
        sums = _train_steps(run, hooks, step, resume, progress)
    distributed.average_statistics(run.model)
    speed = progress.speed()
    run.step, run.sums = 0, [0.0] * 4
    run.round_epoch += 1
    run.epoch += 1
    score = evaluate(run.model, run.validation)
    row = {
        "epoch": run.epoch,
        "round": run.round,
        "lr": run.lr,
        "train_loss": sums["loss"] / (len(run.train) * distributed.count()),
    }
    headline = run.task.names.headline
    row |= {f"train_{headline}": share(sums["hits"], sums["of"])}
    row |= {"validation_loss": score.loss, f"validation_{headline}": score.accuracy, **speed}
    run.history.append(row | strength(run.network))
    if run.fit.select == "best" and score.accuracy > run.best_accuracy:
        run.best_accuracy = score.accuracy
        run.best = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    progress.epoch(row)


def _train_steps(run: Run, hooks: Sequence[Hook], step: Step, resume: Resume | None, progress: Progress) -> dict[str, float]:
    """The steps of an epoch, or of the rest of one; sums over all of them, and over the processes, of the loss and of what the
    headline score is made of."""
    step.begin(run.sums)
    progress.begin()
    looked, look = run.step, run.step + 1
    for images, labels in run.steps(run.train):
        run.lr = learning_rate(run.fit, run.round_epoch + run.step / len(run.train), run.rounds[run.round - 1])
        step.take(images, labels)
        run.step += 1
        if run.step in (look, len(run.train)):
            run.sums = list(step.read())
            _refuse_divergence(run, distributed.total({"loss": run.sums[1]})["loss"])
            progress.step(run.sums[0] / run.step)
            pause = resume.keep(run, hooks, run.step - looked) if resume and run.step < len(run.train) else CHECK_EVERY
            looked, look = run.step, run.step + min(pause, CHECK_EVERY)
    loss, _, hits, of = run.sums
    return distributed.total({"loss": loss, "hits": hits, "of": of})


def learning_rate(fit: Fit, progress: float, epochs: int) -> float:
    """The learning rate after `progress` of `epochs` epochs of a round."""
    if isinstance(fit.schedule, Steps):
        return fit.lr * fit.schedule.factor ** (int(progress) // fit.schedule.every)
    if fit.schedule == "constant":
        return fit.lr
    return fit.lr * 0.5 * (1 + math.cos(math.pi * progress / epochs))


def _begin_optimizer(run: Run, hooks: Sequence[Hook], captured: bool) -> None:
    """A fresh optimiser, its step perhaps `captured`: a group for each rule that hooks give parameters, in the model's order."""
    rules: dict[nn.Parameter, ParameterRule] = {}
    usual = ParameterRule(run.fit.weight_decay)
    for hook in hooks:
        for parameter, rule in hook.parameter_rules(run).items():
            rules[parameter] = rules.get(parameter, usual).then(rule)
    groups: dict[ParameterRule, list[nn.Parameter]] = {}
    for parameter in run.model.parameters():
        if parameter.requires_grad:
            groups.setdefault(rules.get(parameter, usual), []).append(parameter)
    fit = run.fit
    grouped = [{"params": members, **rule._asdict()} for rule, members in groups.items()]
    if fit.optimizer == "adam":
        run.optimizer = torch.optim.Adam(grouped, lr=fit.lr, betas=(fit.momentum, 0.999), fused=True, capturable=captured)
        run.optimizer._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]  # it is, a few steps
    else:
        run.optimizer = torch.optim.SGD(grouped, lr=fit.lr, momentum=fit.momentum, nesterov=fit.nesterov, fused=True)
    if fit.precision == "fp16":
        run.scaler = torch.amp.GradScaler(run.device.type)
        if fit.optimizer == "sgd" and fit.momentum:  # torch would leave them undefined where the first step overflows
            for parameter in (parameter for members in groups.values() for parameter in members):
                run.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _rounds(epochs: int, hooks: Sequence[Hook]) -> list[int]:
    plain = Hook().rounds(epochs)
    plans = [plan for hook in hooks if (plan := hook.rounds(epochs)) != plain]
    assert len(plans) < 2, "two hooks want rounds of their own"
    return plans[0] if plans else plain


def _place(run: Run) -> None:
    """Put the model on the device; plain kernels in the memory order of the images (channels last)."""
    run.model.to(run.device)
    for _, layer in convolutions(run.model):
        if not expanded(layer):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)


def _refuse_divergence(run: Run, loss: float) -> None:
    if not math.isfinite(loss):
        raise InputError(
            f"{run.stage}: the loss is {loss} in epoch {run.epoch + 1} (round {run.round}), last learning rate {run.lr:.3g}; "
            "lower fit.lr, or train in fp32 (fit.precision)"
        )
