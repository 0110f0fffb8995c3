"""Inception gives what PyTorch gives with the same weights, to 1e-4: written there plainly, after the network that the FID was defined by."""
import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn
from torch.nn import functional as F

from flaxdiff.metrics import load_features
from flaxdiff.metrics.features import inception_variables
from flaxdiff.pretrained import write_tensors

CLOSE = 1e-4


class Unit(nn.Module):
    def __init__(self, a, b, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(a, b, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(b, eps=0.001)

    def forward(self, x): return F.relu(self.bn(self.conv(x)))


def mean(x): return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class A(nn.Module):
    def __init__(self, a, pooled):
        super().__init__()
        self.branch1x1 = Unit(a, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Unit(a, 48, 1), Unit(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3 = Unit(a, 64, 1), Unit(64, 96, 3, padding=1), Unit(96, 96, 3, padding=1)
        self.branch_pool = Unit(a, pooled, 1)

    def forward(self, x):
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))), self.branch_pool(mean(x))], 1)


class B(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.branch3x3 = Unit(a, 384, 3, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3 = Unit(a, 64, 1), Unit(64, 96, 3, padding=1), Unit(96, 96, 3, 2)

    def forward(self, x):
        return torch.cat([self.branch3x3(x), self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))), F.max_pool2d(x, 3, 2)], 1)


class C(nn.Module):
    def __init__(self, a, c):
        super().__init__()
        wide, tall = dict(kernel=(1, 7), padding=(0, 3)), dict(kernel=(7, 1), padding=(3, 0))
        self.branch1x1 = Unit(a, 192, 1)
        self.branch7x7_1, self.branch7x7_2, self.branch7x7_3 = Unit(a, c, 1), Unit(c, c, **wide), Unit(c, 192, **tall)
        self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3 = Unit(a, c, 1), Unit(c, c, **tall), Unit(c, c, **wide)
        self.branch7x7dbl_4, self.branch7x7dbl_5 = Unit(c, c, **tall), Unit(c, 192, **wide)
        self.branch_pool = Unit(a, 192, 1)

    def forward(self, x):
        long = self.branch7x7dbl_5(self.branch7x7dbl_4(self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))))
        return torch.cat([self.branch1x1(x), self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))), long, self.branch_pool(mean(x))], 1)


class D(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Unit(a, 192, 1), Unit(192, 320, 3, 2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Unit(a, 192, 1), Unit(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3, self.branch7x7x3_4 = Unit(192, 192, (7, 1), padding=(3, 0)), Unit(192, 192, 3, 2)

    def forward(self, x):
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))), F.max_pool2d(x, 3, 2)], 1)


class E(nn.Module):
    def __init__(self, a, pool):
        super().__init__()
        wide, tall = dict(kernel=(1, 3), padding=(0, 1)), dict(kernel=(3, 1), padding=(1, 0))
        self.pool, self.branch1x1 = pool, Unit(a, 320, 1)
        self.branch3x3_1, self.branch3x3_2a, self.branch3x3_2b = Unit(a, 384, 1), Unit(384, 384, **wide), Unit(384, 384, **tall)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(a, 448, 1), Unit(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Unit(384, 384, **wide), Unit(384, 384, **tall)
        self.branch_pool = Unit(a, 192, 1)

    def forward(self, x):
        h, g = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([self.branch1x1(x), self.branch3x3_2a(h), self.branch3x3_2b(h), self.branch3x3dbl_3a(g), self.branch3x3dbl_3b(g), self.branch_pool(self.pool(x))], 1)


class Inception(nn.Module):
    "With the slip in its last block: a maximum where the paper has a mean."
    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3 = Unit(3, 32, 3, 2), Unit(32, 32, 3), Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Unit(64, 80, 1), Unit(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a = A(192, 32), A(256, 64), A(288, 64), B(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = C(768, 128), C(768, 160), C(768, 160), C(768, 192)
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = D(768), E(1280, mean), E(2048, lambda x: F.max_pool2d(x, 3, 1, 1))
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"): x = getattr(self, f"Mixed_{name}")(x)
        return x.mean((2, 3))


@pytest.fixture(scope="module")
def theirs():
    "Random weights that keep the size of what goes through, and statistics that are not 0 and 1."
    torch.manual_seed(0)
    network = Inception().eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d): nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in ((module.weight, 0.8, 1.2), (module.bias, -0.2, 0.2), (module.running_mean, -0.2, 0.2), (module.running_var, 0.8, 1.2)):
                nn.init.uniform_(values, low, high)
    return network


def test_inception_with_the_same_weights(theirs, tmp_path):
    "From small pictures and from larger ones, in colour and in grey; the head and other entries of the file do no harm."
    write_tensors(tmp_path / "inception.safetensors", {name: x.numpy() for name, x in theirs.state_dict().items()})
    features = dataclasses.replace(load_features(f"inception:{tmp_path / 'inception.safetensors'}"), batch_size=1)
    assert features.name == "inception"
    for size, channels in ((40, 3), (320, 1)):
        images = np.random.default_rng(0).uniform(-1, 1, (1, size, size, channels)).astype(np.float32)
        with torch.no_grad(): want = theirs(torch.from_numpy(np.broadcast_to(images, (1, size, size, 3)).transpose(0, 3, 1, 2).copy())).numpy()
        got = features(images)
        assert got.shape == (1, 2048) and np.abs(want).max() > 0.1
        assert np.abs(got - want).max() < CLOSE * np.abs(want).max(), np.abs(got - want).max() / np.abs(want).max()


def test_a_prefix_is_no_obstacle(theirs):
    state = {f"module.{name}": x.numpy() for name, x in theirs.state_dict().items()}
    assert inception_variables(state)["params"]["Mixed_7c"]["branch3x3_2a"]["conv"]["kernel"].shape == (1, 3, 384, 384)
