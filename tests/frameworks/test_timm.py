# SPDX-License-Identifier: MIT
"""timm's factory of optimizers, its schedule of lr, its checkpoints and its Lookahead."""

import pytest
import torch

import lpsgd
from helpers import CLASSES, assert_same_bits, needs_fma, sgd_with_dampening

timm = pytest.importorskip("timm")
from timm.optim._optim_factory import OptimInfo, default_registry  # noqa: E402
from timm.scheduler import create_scheduler_v2  # noqa: E402
from timm.utils import CheckpointSaver, dispatch_clip_grad  # noqa: E402

EPOCHS = 4
BATCHES = 5

NAMES = {lpsgd.LPSGD: "lpsgd", lpsgd.LPSGDM: "lpsgdm"}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(default_registry, "_optimizers", {**default_registry._optimizers})
    default_registry.register(OptimInfo("lpsgd", lpsgd.LPSGD))
    default_registry.register(OptimInfo("lpsgdm", lpsgd.LPSGDM, has_momentum=True))


def network():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=8,
        embed_dim=16,
        depth=1,
        num_heads=2,
        num_classes=10,
    )


def batches(epoch):
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(BATCHES):
        x = torch.randn(4, 3, 16, 16, generator=generator)
        yield x, torch.randint(10, (4,), generator=generator)


def run(model, optimizer, first=0, last=EPOCHS, after_step=lambda: None):
    """Epochs of timm's training script: a warm-up and cosine of lr by its own scheduler."""
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=EPOCHS, warmup_epochs=1, warmup_lr=1e-3
    )
    scheduler.step(first)
    for epoch in range(first, last):
        for x, y in batches(epoch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            dispatch_clip_grad(model.parameters(), 0.5, mode="norm")
            optimizer.step()
            after_step()
        scheduler.step(epoch + 1)
    return model


@pytest.mark.parametrize("cls", CLASSES)
def test_the_factory_makes_the_class_and_its_groups(cls):
    model = network()
    optimizer = timm.optim.create_optimizer_v2(
        model, opt=NAMES[cls], lr=0.02, weight_decay=0.05, momentum=0.8, p=4.0, eps=1e-6
    )
    assert type(optimizer) is cls
    without_decay, with_decay = optimizer.param_groups
    assert (without_decay["weight_decay"], with_decay["weight_decay"]) == (0.0, 0.05)
    assert all(param.ndim > 1 for param in with_decay["params"])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        list(model.parameters())
    )
    for group in optimizer.param_groups:
        assert (group["lr"], group["p"], group["eps"]) == (0.02, 4.0, 1e-6)
        assert group.get("momentum") == (0.8 if cls is lpsgd.LPSGDM else None)


@pytest.mark.parametrize("cls", CLASSES)
def test_training_has_the_bits_of_hand_made_groups(cls):
    made, by_hand = network(), network()
    optimizer = timm.optim.create_optimizer_v2(made, opt=NAMES[cls], lr=0.02, weight_decay=0.05)
    schedule = lpsgd.CosineAnnealingP(optimizer, EPOCHS * BATCHES)
    run(made, optimizer, after_step=schedule.step)
    assert schedule.get_last_p() == [2.0, 2.0]

    skipped = by_hand.no_weight_decay()
    without = [w for name, w in by_hand.named_parameters() if w.ndim <= 1 or name in skipped]
    rest = [w for name, w in by_hand.named_parameters() if w.ndim > 1 and name not in skipped]
    optimizer = cls([{"params": without}, {"params": rest, "weight_decay": 0.05}], lr=0.02)
    lpsgd.CosineAnnealingP(optimizer, EPOCHS * BATCHES, every_step=True)
    run(by_hand, optimizer)
    assert_same_bits(made, by_hand)


@needs_fma
@pytest.mark.parametrize("cls", CLASSES)
def test_p2_is_sgd_bitwise(cls):
    ours, theirs = network(), network()
    optimizer = timm.optim.create_optimizer_v2(ours, opt=NAMES[cls], lr=0.1, p=2.0)
    if cls is lpsgd.LPSGDM:
        sgd = sgd_with_dampening(theirs.parameters(), lr=0.1)
    else:
        sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, foreach=False)
    assert_same_bits(run(ours, optimizer), run(theirs, sgd))


@pytest.mark.parametrize("cls", CLASSES)
def test_it_resumes_in_the_middle_of_the_schedule(cls, tmp_path):
    def made():
        model = network()
        optimizer = timm.optim.create_optimizer_v2(model, opt=NAMES[cls], lr=0.02)
        lpsgd.CosineAnnealingP(optimizer, EPOCHS * BATCHES + 9, every_step=True)
        return model, optimizer

    whole = made()
    run(*whole)
    half = made()
    run(*half, last=EPOCHS // 2)
    CheckpointSaver(*half, checkpoint_dir=str(tmp_path)).save_checkpoint(EPOCHS // 2 - 1, 0.0)
    resumed = made()
    last = str(tmp_path / "last.pth.tar")
    first = timm.models.resume_checkpoint(resumed[0], last, resumed[1])
    assert first == EPOCHS // 2
    run(*resumed, first=first)
    assert_same_bits(whole[0], resumed[0])
    p, resumed_p = (optimizer.param_groups[0]["p"] for _, optimizer in (whole, resumed))
    assert 2.0 < p == resumed_p < 6.0


@pytest.mark.parametrize("cls", CLASSES)
def test_lookahead_steps_it_and_averages(cls):
    def fast(model, optimizer):
        """What Lookahead with k = 6 and alpha = 1/2 is, by hand."""
        slow, steps = {}, []

        def after_step():
            steps.append(1)
            if len(steps) % 6 == 0:
                for param in model.parameters():
                    start = slow.setdefault(param, param.detach().clone())
                    start.add_(param.detach() - start, alpha=0.5)
                    param.data.copy_(start)

        return run(model, optimizer, after_step=after_step)

    model, by_hand = network(), network()
    optimizer = timm.optim.create_optimizer_v2(model, opt=f"lookahead_{NAMES[cls]}", lr=0.02)
    assert_same_bits(run(model, optimizer), fast(by_hand, cls(by_hand.parameters(), lr=0.02)))


def test_p_moves_by_itself_within_lookahead():
    model = network()
    optimizer = timm.optim.create_optimizer_v2(model, opt="lookahead_lpsgdm", lr=0.02)
    lpsgd.CosineAnnealingP(optimizer, EPOCHS * BATCHES, every_step=True)
    run(model, optimizer)
    assert optimizer.param_groups[0]["p"] == 2.0
