"""Image encoders: the observed images of one camera → features, once a plan.

    normalized images (B, To, H, W, C) → backbone, image by image → features (B, To · F)

A backbone is a trunk, for which others publish weights, and a head that makes features of its maps. What a frozen trunk
gives can be kept, and taken by the head alone.

The last axis is the channels', as cameras and stores have it; for convolutions that order is torch's channels-last. No
layer looks at other images of a batch (GroupNorm, no BatchNorm), so a result does not depend on its neighbours, and
moving averages of the weights are those of a network that could have been trained.

Knows tensors. Knows no store, and no dtype but float.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from diffusion_policy.networks.transformer import SelfAttention

RESNET_NAMES = ("fc.", "running_mean", "running_var", "num_batches_tracked")
"""What published weights of a ResNet hold beside those that are taken: the classifier, and BatchNorm's statistics."""


class ImageEncoder(nn.Module):
    """Images of one camera, or of several that share it: (B, To, H, W, C) → (B, To · F)."""

    def __init__(self, backbone: nn.Module, features: int) -> None:
        """`backbone`: with `trunk`, (images, C, H, W) → maps, and `head`, maps → (images, F)."""
        super().__init__()
        self.backbone = backbone
        self.numbers = features
        """Features of one image."""

    def forward(self, images: Tensor) -> Tensor:
        return self.features_of(self.maps_of(images))

    def maps_of(self, images: Tensor) -> Tensor:
        """What the trunk makes of normalized images, (B, To, *maps)."""
        flat = rearrange(images, "b t h w c -> (b t) c h w")  # in memory still (h, w, c)
        return self.backbone.trunk(flat).unflatten(0, images.shape[:2])  # pyright: ignore[reportCallIssue]

    def features_of(self, maps: Tensor) -> Tensor:
        """What the head makes of a trunk's maps (B, To, *maps): (B, To · F)."""
        features = self.backbone.head(maps.flatten(0, 1))  # pyright: ignore[reportCallIssue]
        return rearrange(features, "(b t) f -> b (t f)", b=len(maps))

    def keypoints(self, images: Tensor) -> Tensor | None:
        """Where the spatial softmax looks in each image, (B, To, K, 2): x and y from -1 to 1, to the right and down;
        None where the backbone has none."""
        if not isinstance(self.backbone, PointsBackbone):
            return None
        maps = self.maps_of(images)
        return self.backbone.head.points(maps.flatten(0, 1)).unflatten(0, maps.shape[:2])


class PointsBackbone(nn.Module):
    """A convolutional trunk, and where in the image its maps are active."""

    def __init__(self, trunk: nn.Module, channels: int, keypoints: int, features: int) -> None:
        """`channels`: of the trunk's maps."""
        super().__init__()
        self.trunk = trunk
        self.head = PointsHead(channels, keypoints, features)


class PointsHead(nn.Module):
    """Maps (N, channels, h, w) → the places where K maps made of them are active, made features by a linear layer,
    (N, F)."""

    def __init__(self, channels: int, keypoints: int, features: int) -> None:
        super().__init__()
        self.maps = nn.Conv2d(channels, keypoints, 1)
        self.softmax = SpatialSoftmax()
        self.out = nn.Linear(2 * keypoints, features)

    def points(self, maps: Tensor) -> Tensor:
        """The keypoints' places, (N, K, 2)."""
        return self.softmax(self.maps(maps))

    def forward(self, maps: Tensor) -> Tensor:
        return self.out(self.points(maps).flatten(1))


class SpatialSoftmax(nn.Module):
    """The expected place of each map under the softmax over its pixels (Levine et al. 2016, arXiv 1504.00702, section
    5.1), with a learned temperature: (N, K, h, w) → (N, K, 2), x and y from -1 to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.zeros(()))

    def forward(self, maps: Tensor) -> Tensor:
        height, width = maps.shape[2:]
        shares = torch.softmax(maps.flatten(2) * torch.exp(-self.log_temperature), dim=-1).unflatten(2, (height, width))
        x, y = (torch.linspace(-1, 1, size, device=maps.device, dtype=shares.dtype) for size in (width, height))
        return torch.stack([shares.sum(2) @ x, shares.sum(3) @ y], dim=-1)


def make_cnn(
    image: tuple[int, int, int], features: int, *, cnn_widths: Sequence[int], keypoints: int
) -> PointsBackbone:
    """Convolutions of 5 and 3 pixels, of which the first two halve the image; each pixel of the last maps sees 17 of
    the image, and 8 more for each width beyond the third."""
    layers: list[nn.Module] = []
    before = image[2]
    for i, width in enumerate(cnn_widths):
        size, stride = (5 if i == 0 else 3), (2 if i < 2 else 1)
        layers += [nn.Conv2d(before, width, size, stride, size // 2), nn.GroupNorm(_groups(width), width), nn.ReLU()]
        before = width
    return PointsBackbone(nn.Sequential(*layers), before, keypoints, features)


def make_resnet18(image: tuple[int, int, int], features: int, *, keypoints: int) -> PointsBackbone:
    """ResNet-18 (He et al. 2016, arXiv 1512.03385, table 1) with GroupNorm of 16 channels a group (Wu & He 2018, arXiv
    1803.08494), without its classifier. Raises ValueError for images of which it leaves one pixel, so no place."""
    if min(image[:2]) <= 32:
        raise ValueError(f"resnet18 needs images above 32 x 32 px; got {image[0]} x {image[1]}, after the crop")
    return PointsBackbone(ResNet18(image[2]), 512, keypoints, features)


class ResNet18(nn.Module):
    """(N, C, H, W) → (N, 512, H / 32, W / 32). Names of weights are those under which they are published."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.GroupNorm(4, 64)
        self.relu, self.maxpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        widths = (64, 64, 128, 256, 512)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(ResidualBlock(before, width, 1 if i == 0 else 2), ResidualBlock(width, width, 1))
            for i, (before, width) in enumerate(itertools.pairwise(widths))
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut: (N, before, H, W) → (N, width, H / stride, W / stride)."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.GroupNorm(width // 16, width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.GroupNorm(width // 16, width)
        self.relu = nn.ReLU()
        self.downsample = (
            nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.GroupNorm(width // 16, width))
            if stride > 1 or before != width
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(shortcut + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


class VitBackbone(nn.Module):
    """A small transformer over patches, as DPPO and IBRL have it; the tokens are weighed into one vector by learned
    places."""

    def __init__(
        self, image: tuple[int, int, int], features: int, *, vit_width: int, vit_layers: int, vit_heads: int
    ) -> None:
        """`image`: height, width and channels, of which the height and width cannot change. Raises ValueError for
        images too small for one patch."""
        super().__init__()
        height, width = (((size - 8) // 4 + 1 - 3) // 2 + 1 for size in image[:2])
        if min(height, width) < 1:
            raise ValueError(f"a vit needs images of at least 16 x 16 px; got {image[0]} x {image[1]}, after the crop")
        self.trunk = VisionTransformer(image[2], height * width, vit_width, vit_layers, vit_heads)
        self.head = TokensHead(height * width, vit_width, features)


class VisionTransformer(nn.Module):
    """Two convolutions cut the image into overlapping patches, and blocks of pre-norm attention follow:
    (N, C, H, W) → (N, M, width)."""

    def __init__(self, channels: int, tokens: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Sequential(nn.Conv2d(channels, width, 8, 4), nn.ReLU(), nn.Conv2d(width, width, 3, 2))
        self.positions = nn.Parameter(nn.init.normal_(torch.empty(tokens, width), std=0.02))
        self.blocks = nn.Sequential(*(PreNormBlock(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        tokens = rearrange(self.patches(images), "n f h w -> n (h w) f") + self.positions
        return self.norm(self.blocks(tokens))


class TokensHead(nn.Module):
    """Tokens (N, M, width) → one vector, (N, F): what each of their numbers is at learned places, weighed."""

    def __init__(self, tokens: int, width: int, features: int) -> None:
        super().__init__()
        self.places = nn.Sequential(nn.Linear(tokens, features), nn.LayerNorm(features), nn.ReLU())
        self.weights = nn.Parameter(nn.init.normal_(torch.empty(width, features), std=width**-0.5))
        self.out = nn.LayerNorm(features)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out((self.places(tokens.mT) * self.weights).sum(1))


class PreNormBlock(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)): (N, M, width) → like x."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, 0.0)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "cnn": make_cnn,
    "resnet18": make_resnet18,
    "vit": VitBackbone,
}
"""By the kind of its options: (image (H, W, C) after the crop, features, and its own options) → backbone."""


def _groups(width: int) -> int:
    """Of a GroupNorm over so many channels: of 16 channels each, where that divides them, else one."""
    return width // 16 if width % 16 == 0 else 1


# What is done to images beside the network


def crop_size(size: int, share: float) -> int:
    """Side of the window that is cut from an image's side [px]."""
    return max(1, round(size * share))


def center_window(size: Sequence[int], share: float) -> tuple[int, int, int, int]:
    """Where the middle of an image lies whose height and width are `size`: top, left, height and width [px]."""
    height, width = (crop_size(side, share) for side in size)
    return (size[0] - height) // 2, (size[1] - width) // 2, height, width


def center_crop(images: Tensor, share: float) -> Tensor:
    """The middle of images (..., H, W, C): (..., h, w, C)."""
    if share == 1:
        return images
    top, left, height, width = center_window(images.shape[-3:-1], share)
    return images[..., top : top + height, left : left + width, :]


def random_crop(images: Tensor, share: float, places: Tensor) -> Tensor:
    """A window of each row's images (B, To, H, W, C), all of a row at the same place: (B, To, h, w, C). `places`: from
    0 to below 1, of all that there are, down and to the right, (B, 2)."""
    if share == 1:
        return images
    height, width = (crop_size(size, share) for size in images.shape[-3:-1])
    windows = images.unfold(2, height, 1).unfold(3, width, 1)  # (B, To, tops, lefts, C, h, w), a view
    top, left = ((places[:, i] * windows.shape[2 + i]).long() for i in range(2))
    rows = torch.arange(len(images), device=images.device)
    return rearrange(windows[rows, :, top, left], "b t c h w -> b t h w c").contiguous()


def jitter(images: Tensor, strength: float, draws: Tensor) -> Tensor:
    """Other brightness, contrast and saturation of normalized images (B, To, h, w, C), the same for all of a row.
    `draws`: from 0 to below 1, (B, 3); each factor is 1 + strength (2 draw - 1)."""
    factors = 1 + strength * (2 * draws - 1)
    brightness, contrast, saturation = (one.view(-1, 1, 1, 1, 1) for one in factors.unbind(-1))
    mean = images.mean(dim=(1, 2, 3, 4), keepdim=True)
    images = mean + contrast * (images - mean)
    grey = images.mean(dim=-1, keepdim=True)
    return grey + saturation * (images - grey) + (brightness - 1)


AUGMENTATION_DRAWS = 5
"""Numbers from 0 to below 1 by which the images of a key are changed: place of the crop, then those of `jitter`."""


def load_trunk(trunk: nn.Module, weights: Mapping[str, Tensor], source: str) -> list[str]:
    """Take weights by name into a trunk; returns the names of its own that they lack: its norms, where they were
    BatchNorms. Raises ValueError for weights that do not fit, naming the first."""
    wanted = trunk.state_dict()
    normed = any(name.endswith("running_mean") for name in weights)
    taken = {
        name: tensor
        for name, tensor in weights.items()
        if name in wanted and not (normed and wanted[name].ndim == 1)  # BatchNorm's mean nothing to GroupNorm
    }
    unknown = [name for name in weights if name not in wanted and not any(known in name for known in RESNET_NAMES)]
    wrong = [name for name, tensor in taken.items() if tensor.shape != wanted[name].shape]
    if wrong:
        got, needed = tuple(taken[wrong[0]].shape), tuple(wanted[wrong[0]].shape)
        raise ValueError(f"{source}: {wrong[0]} has the shape {got}; this encoder needs {needed}")
    lacking = [name for name in wanted if name not in taken and wanted[name].ndim > 1]
    if unknown or lacking:
        found = f"has no {lacking[0]}" if lacking else f"has {unknown[0]}, which the encoder does not"
        raise ValueError(f"{source}: the weights do not fit the encoder: it {found}; names are those of the encoder")
    trunk.load_state_dict({**wanted, **taken})
    return [name for name in wanted if name not in taken]
