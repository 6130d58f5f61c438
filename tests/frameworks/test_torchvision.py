# SPDX-License-Identifier: MIT
"""A loop like torchvision's reference training script, with its models and data sets."""

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lpsgd
from helpers import CLASSES, assert_same_bits, needs_fma, sgd_with_dampening

torchvision = pytest.importorskip("torchvision")

EPOCHS = 4
BATCHES = 3


def loader():
    dataset = torchvision.datasets.FakeData(
        4 * BATCHES, (3, 32, 32), 10, transform=torchvision.transforms.ToTensor()
    )
    return torch.utils.data.DataLoader(dataset, batch_size=4)


class Training:
    """All that the script makes before its loop: model, average, optimizer, schedule of lr."""

    def __init__(self, optimizer_of):
        torch.manual_seed(0)
        self.model = torchvision.models.resnet18(num_classes=10)
        self.model_ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.optimizer = optimizer_of(self.model.parameters())
        warmup = LinearLR(self.optimizer, start_factor=0.1, total_iters=1)
        cosine = CosineAnnealingLR(self.optimizer, T_max=EPOCHS - 1)
        self.lr_scheduler = SequentialLR(self.optimizer, [warmup, cosine], milestones=[1])

    def run(self, first=0, last=EPOCHS):
        for _ in range(first, last):
            for image, target in loader():
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = torch.nn.functional.cross_entropy(self.model(image), target)
                self.optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.model_ema.update_parameters(self.model)
            self.lr_scheduler.step()
        return self

    def parts(self):
        return [self.model, self.model_ema, self.optimizer, self.lr_scheduler]


@needs_fma
@pytest.mark.parametrize("cls", CLASSES)
def test_p2_is_sgd_bitwise(cls):
    def theirs(params):
        if cls is lpsgd.LPSGDM:
            return sgd_with_dampening(params, lr=0.1)
        return torch.optim.SGD(params, lr=0.1, foreach=False)

    ours = Training(lambda params: cls(params, lr=0.1, p=2.0)).run()
    reference = Training(theirs).run()
    assert_same_bits(ours.model, reference.model)
    assert_same_bits(ours.model_ema, reference.model_ema)


@pytest.mark.parametrize("cls", CLASSES)
def test_it_resumes_in_the_middle_of_the_schedule(cls, tmp_path):
    def made():
        training = Training(lambda params: cls(params, lr=0.01))
        lpsgd.CosineAnnealingP(training.optimizer, EPOCHS * BATCHES + 5, every_step=True)
        return training

    whole = made().run()
    half = made().run(last=EPOCHS // 2)
    torch.save([part.state_dict() for part in half.parts()], tmp_path / "checkpoint.pth")
    resumed = made()
    states = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    for part, state in zip(resumed.parts(), states, strict=True):
        part.load_state_dict(state)
    resumed.run(first=EPOCHS // 2)
    assert_same_bits(whole.model, resumed.model)
    assert_same_bits(whole.model_ema, resumed.model_ema)
    p, resumed_p = (each.optimizer.param_groups[0]["p"] for each in (whole, resumed))
    assert 2.0 < p == resumed_p < 6.0
