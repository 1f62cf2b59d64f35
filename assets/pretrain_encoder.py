"""Pretrain the small CLIP vision encoder of `assets/tiny-clip` on rendered scenes with captions.

    python assets/pretrain_encoder.py --output assets/tiny-clip       # train and save
    python assets/pretrain_encoder.py --evaluate assets/tiny-clip     # measure, beside an untrained encoder

Everything that training sees is made here: PIL draws the scenes, templates write the captions. easy-VQA
(`pip install easy-vqa`) is opened by `--evaluate` only, as data the encoder has never seen.

Letters in the shapes: B batch, P patches (16), H hidden size (128), D width of the joint space (128).
"""

import argparse
import itertools
import math
import random
import re
import time
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

IMAGE_SIZE = 64  # pixels
CANVAS = 2 * IMAGE_SIZE  # scenes are drawn at twice the size and averaged down, which smooths their edges
JOINT_SIZE = 128
TEXT_BUCKETS = 4096
HELD_OUT_SEED = 10_000_019  # scenes of the evaluations; training seeds count up from --seed

# Several RGB values under one name, and jitter on top, so that a name is a region and not a point.
COLORS = {
    "red": [(255, 0, 0), (200, 20, 30)],
    "green": [(0, 255, 0), (0, 140, 0), (50, 205, 50)],
    "blue": [(0, 0, 255), (30, 70, 220)],
    "black": [(0, 0, 0), (20, 20, 25)],
    "gray": [(128, 128, 128), (100, 100, 105), (150, 150, 150)],
    "teal": [(0, 128, 128), (0, 140, 130)],
    "brown": [(165, 42, 42), (139, 69, 19), (120, 60, 30)],
    "yellow": [(255, 255, 0), (240, 220, 30)],
    "orange": [(255, 140, 0), (250, 120, 30)],
    "purple": [(128, 0, 128), (140, 40, 200)],
    "pink": [(255, 130, 180), (255, 90, 200)],
    "cyan": [(0, 230, 240), (60, 210, 255)],
    "white": [(255, 255, 255), (240, 240, 240)],
}
SMALLEST = 5.0  # radius of the smallest objects, in pixels
JITTER = 18  # largest change of a colour channel, of 255


# Scenes ---------------------------------------------------------------------------------------------------------


def regular(corners, start=-math.pi / 2, radii=(1.0,)):
    """Corner points of a regular polygon around (0, 0); `radii` are used in turn (two of them make a star)."""
    angles = [start + 2 * math.pi * i / corners for i in range(corners)]
    return [(radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(angles)]


def rectangle(rng):
    aspect = rng.uniform(0.4, 1.0)
    return [(-1, -aspect), (1, -aspect), (1, aspect), (-1, aspect)]


def triangle(rng):
    apex, height = rng.uniform(-0.3, 0.3), rng.uniform(0.7, 1.1)
    return [(apex, -height), (1, 0.8 * height), (-1, 0.8 * height)]


def ellipse(rng):
    aspect = rng.uniform(0.35, 0.65)
    return [(x, aspect * y) for x, y in regular(32)]


def ring(rng):
    """Outer and inner circle as one path: PIL fills by the even-odd rule, so the inside stays empty."""
    inner = rng.uniform(0.5, 0.7)
    outer = regular(32)
    hole = [(inner * x, inner * y) for x, y in outer]
    return outer + outer[:1] + hole + hole[:1]


def cross(rng):
    w = rng.uniform(0.25, 0.4)
    return [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w), (-w, -w)]


def line(rng):
    w = rng.uniform(0.08, 0.16)
    return [(-1.1, -w), (1.1, -w), (1.1, w), (-1.1, w)]


def semicircle(rng):
    return [(math.cos(math.pi * i / 16), 0.4 - math.sin(math.pi * i / 16)) for i in range(17)]


def arrow(rng):
    w = rng.uniform(0.2, 0.3)
    return [(-1, -w), (0.1, -w), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, w), (-1, w)]


def heart(rng):
    angles = [2 * math.pi * i / 32 for i in range(32)]
    return [(math.sin(a) ** 3, -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a)) / 16) for a in angles]


SHAPES = {  # name -> function of a random generator, gives the corner points in the square from -1 to 1
    "circle": lambda rng: regular(32),
    "rectangle": rectangle,
    "triangle": triangle,
    "ellipse": ellipse,
    "star": lambda rng: regular(10, radii=(1.0, rng.uniform(0.4, 0.5))),
    "cross": cross,
    "ring": ring,
    "pentagon": lambda rng: regular(5),
    "line": line,
    "semicircle": semicircle,
    "arrow": arrow,
    "heart": heart,
}


def jittered(rgb, rng):
    return tuple(min(255, max(0, channel + rng.randint(-JITTER, JITTER))) for channel in rgb)


def sample_background(rng):
    """An RGB colour and its word. Mostly light: there every named colour but white can be seen."""
    word, low, high = rng.choices([("light", 215, 255), ("dark", 0, 70), ("medium", 90, 190)], [0.75, 0.1, 0.15])[0]
    return tuple(rng.randint(low, high) for _ in range(3)), word


def sample_color(rng, background, palette):
    """A colour name and an RGB value of it that differs visibly from the background; first from the palette."""
    for attempt in itertools.count():
        name = rng.choice(palette if attempt < 20 else list(COLORS))
        rgb = jittered(rng.choice(COLORS[name]), rng)
        if sum(abs(a - b) for a, b in zip(rgb, background, strict=True)) > 110:
            return name, rgb


def sample_object(rng, background, palette, others):
    """One object as a dict (lengths in pixels of the image), or None where no free place was found."""
    for _ in range(20):
        radius = math.exp(rng.uniform(math.log(SMALLEST), math.log(25.0)))
        x, y = (rng.uniform(0.9 * radius, IMAGE_SIZE - 0.9 * radius) for _ in range(2))
        if all(math.hypot(x - o["x"], y - o["y"]) > 0.9 * (radius + o["radius"]) for o in others):
            break
    else:
        return None
    color, rgb = sample_color(rng, background, palette)
    # Most objects stand upright or lie on a side, as in most drawings; the others are turned freely.
    angle = rng.choice([0, 0, 0, 0.5]) * math.pi if rng.random() < 0.85 else rng.uniform(0, 2 * math.pi)
    # The three plainest shapes make up half of all objects.
    shape = rng.choices(list(SHAPES), [3, 3, 3] + [1] * (len(SHAPES) - 3))[0]
    return {"shape": shape, "color": color, "rgb": rgb, "x": x, "y": y, "radius": radius, "angle": angle}


def sample_scene(rng, palette):
    """A scene: background colour and word, one to three objects that hardly overlap, strength of the noise."""
    background, word = sample_background(rng)
    objects = []
    for _ in range(rng.choices([1, 2, 3], [0.7, 0.2, 0.1])[0]):
        candidate = sample_object(rng, background, palette, objects)
        if candidate is not None:
            objects.append(candidate)
    noise = rng.uniform(2, 14) if rng.random() < 0.25 else 0.0
    return {"background": background, "word": word, "objects": objects, "noise": noise}


def draw_object(draw, item, rng):
    """Turn, scale and shift the shape's corner points, then fill them."""
    cos, sin, scale = math.cos(item["angle"]), math.sin(item["angle"]), CANVAS / IMAGE_SIZE
    points = [
        (scale * (item["x"] + item["radius"] * (cos * u - sin * v)),
         scale * (item["y"] + item["radius"] * (sin * u + cos * v)))
        for u, v in SHAPES[item["shape"]](rng)
    ]  # fmt: skip
    draw.polygon(points, fill=item["rgb"])


def render(scene, rng):
    """The scene as a PIL image, 64 x 64, RGB, without noise."""
    canvas = Image.new("RGB", (CANVAS, CANVAS), scene["background"])
    draw = ImageDraw.Draw(canvas)
    for item in scene["objects"]:
        draw_object(draw, item, rng)
    return canvas.reduce(CANVAS // IMAGE_SIZE)


# Captions -------------------------------------------------------------------------------------------------------


def place(item):
    """Words for the ninth of the image that the object's centre lies in."""
    column = ("left", "middle", "right")[min(2, int(3 * item["x"] / IMAGE_SIZE))]
    row = ("top", "middle", "bottom")[min(2, int(3 * item["y"] / IMAGE_SIZE))]
    if row == column:
        return "in the middle"
    return "at the " + " ".join(word for word in (row, column) if word != "middle")


def describe(item, rng):
    """A noun phrase: colour and shape always, size and place sometimes."""
    color = "grey" if item["color"] == "gray" and rng.random() < 0.3 else item["color"]
    size = ""
    if rng.random() < 0.5:
        radius = item["radius"]
        words = ("small", "tiny") if radius < 8 else ("large", "big") if radius > 15 else ("medium", "mid-sized")
        size = rng.choice(words) + " "
    where = " " + place(item) if rng.random() < 0.5 else ""
    return f"a {size}{color} {item['shape']}{where}"


def relation(first, second):
    """Where `first` is, seen from `second`, along the axis on which they are further apart."""
    dx, dy = first["x"] - second["x"], first["y"] - second["y"]
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def write_caption(scene, rng):
    """One of many true sentences about the scene; it names every object."""
    objects = rng.sample(scene["objects"], len(scene["objects"]))
    phrases = [describe(item, rng) for item in objects]
    if len(objects) == 2 and rng.random() < 0.5:
        body = f"{phrases[0]} {relation(*objects)} {phrases[1]}"
    else:
        body = " and ".join(phrases)
    body = rng.choice(["{}", "{}", "there is {}", "an image of {}", "a picture with {}", "{} can be seen"]).format(
        body
    )
    body += f" on a {scene['word']} background" if rng.random() < 0.3 else ""
    return re.sub(r"\ba (?=[aeiou])", "an ", body)


def token_ids(caption):
    """Bucket numbers of all runs of one to three words: word order is kept, and no vocabulary file is needed."""
    words = caption.split()
    runs = (" ".join(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words) - n + 1))
    return [zlib.crc32(run.encode()) % TEXT_BUCKETS for run in runs]


# Batches --------------------------------------------------------------------------------------------------------


def list_regions(scenes):
    """Every object as (number of its scene, x and y of its centre as shares of the image, its noun phrase)."""
    return [
        (number, item["x"] / IMAGE_SIZE, item["y"] / IMAGE_SIZE, f"a {item['color']} {item['shape']}")
        for number, scene in enumerate(scenes)
        for item in scene["objects"]
    ]


def make_batch(size, seed, colors=None):
    """Scenes of one seed: images uint8 [B, 64, 64, 3], B captions, and the objects' regions (see `list_regions`).

    `colors` is how many colour names occur (default: all).
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    palette = rng.sample(list(COLORS), colors or len(COLORS))
    scenes = [sample_scene(rng, palette) for _ in range(size)]
    raw = b"".join(render(scene, rng).tobytes() for scene in scenes)
    images = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(size, IMAGE_SIZE, IMAGE_SIZE, 3)
    strength = torch.tensor([scene["noise"] for scene in scenes]).view(-1, 1, 1, 1)
    noise = strength * torch.randn(images.shape, generator=generator)
    images = (images + noise).clamp(0, 255).to(torch.uint8)
    return images, [write_caption(scene, rng) for scene in scenes], list_regions(scenes)


def make_image_processor():
    """CLIP's own processor for 64 x 64 pixels, in its PIL form, which needs no torchvision."""
    edges = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=edges)


def normalise(images, processor):
    """What the processor does with images of its own size: uint8 [B, 64, 64, 3] to float [B, 3, 64, 64]."""
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    return ((images / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def pack(captions):
    """Token ids of all captions in a row [N], and where each caption starts [B]: what EmbeddingBag takes."""
    ids = [token_ids(caption) for caption in captions]
    lengths = torch.tensor([0] + [len(i) for i in ids[:-1]])
    return torch.tensor([number for caption in ids for number in caption]), lengths.cumsum(0)


# Model ----------------------------------------------------------------------------------------------------------


def make_vision(patch_size=16):
    """The untrained encoder: 4 layers, hidden size 128, about 0.9 million parameters, as transformers starts it."""
    config = CLIPVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=patch_size,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=JOINT_SIZE,
    )
    return CLIPVisionModel(config)


class TextTower(nn.Module):
    """Captions to the joint space: mean embedding of their word runs, then an MLP. Not kept after training."""

    def __init__(self):
        super().__init__()
        self.runs = nn.EmbeddingBag(TEXT_BUCKETS, JOINT_SIZE, mode="mean")
        self.mlp = nn.Sequential(
            nn.LayerNorm(JOINT_SIZE),
            nn.Linear(JOINT_SIZE, 4 * JOINT_SIZE),
            nn.GELU(),
            nn.Linear(4 * JOINT_SIZE, JOINT_SIZE),
        )

    def forward(self, captions):
        """B captions to unit vectors [B, D]."""
        return F.normalize(self.mlp(self.runs(*pack(captions))), dim=-1)


class Contrast(nn.Module):
    """Vision encoder, text tower and the heads between them."""

    def __init__(self, vision):
        super().__init__()
        hidden = vision.config.hidden_size
        self.vision, self.text = vision, TextTower()
        self.patch_head = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, JOINT_SIZE))
        self.region_head = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, JOINT_SIZE))
        self.class_head = nn.Linear(hidden, JOINT_SIZE)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_images(self, pixels):
        """Patches [B, P, H] of the layer before the last, and unit vectors [B, D] of their mean and of CLS.

        Language models read the patches of that layer (`hidden_states[-2]`, as in LLaVA), so these get a loss of
        their own; a loss on CLS alone leaves it open where in the sequence the content is kept.
        """
        output = self.vision(pixels, output_hidden_states=True)
        patches = output.hidden_states[-2][:, 1:]
        by_patches, by_class = self.patch_head(patches.mean(1)), self.class_head(output.pooler_output)
        return patches, F.normalize(by_patches, dim=-1), F.normalize(by_class, dim=-1)

    def region_loss(self, patches, regions, scale):
        """Cross-entropy in nats: which of the batch's noun phrases belongs to the patch under an object's centre."""
        side = math.isqrt(patches.shape[1])
        rows = [number for number, *_ in regions]
        places = [min(side - 1, int(y * side)) * side + min(side - 1, int(x * side)) for _, x, y, _ in regions]
        phrases = sorted({phrase for *_, phrase in regions})
        target = torch.tensor([phrases.index(phrase) for *_, phrase in regions])
        image = F.normalize(self.region_head(patches[rows, places]), dim=-1)
        return F.cross_entropy(scale * image @ self.text(phrases).T, target)

    def forward(self, pixels, captions, regions):
        """Three contrastive losses [3] in nats: mean of the patches, CLS, and regions."""
        text, scale = self.text(captions), self.log_scale.exp().clamp(max=100)
        patches, by_patches, by_class = self.encode_images(pixels)
        whole = [clip_loss(by_patches, text, scale), clip_loss(by_class, text, scale)]
        return torch.stack([*whole, self.region_loss(patches, regions, scale)])


def clip_loss(image, text, scale):
    """Symmetric cross-entropy of CLIP over image [B, D] and text [B, D], in nats."""
    logits, target = scale * image @ text.T, torch.arange(len(image))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def top1(image, text):
    """Share of the images [B, D] whose own text is the nearest of the B texts [B, D]. Chance is 1 / B."""
    return ((image @ text.T).argmax(1) == torch.arange(len(image))).float().mean().item()


# Training -------------------------------------------------------------------------------------------------------


def make_optimizers(model, learning_rate):
    """Muon for the matrices of the encoder's layers, AdamW for the rest: [(optimizer, highest rate), ...].

    With AdamW alone, on scenes slightly harder than these, the region loss was after 850 steps still near the level of
    known colours and guessed shapes.
    """
    layers = [p for name, p in model.vision.named_parameters() if p.ndim == 2 and "layers" in name]
    taken = set(map(id, layers))
    rest = [p for p in model.parameters() if id(p) not in taken]
    muon = torch.optim.Muon(layers, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.01)
    return [(muon, 5 * learning_rate), (adam, learning_rate)]


def learning_rate_at(progress, highest):
    """The rate at `progress` (0 to 1) of the run: a warm-up over the first twentieth, then a cosine down to zero."""
    return highest * min(1.0, 0.01 + 20 * progress) * 0.5 * (1 + math.cos(math.pi * progress))


def train(args):
    """Train with fresh scenes in every step, so no image is seen twice; returns the model.

    The run ends after `--steps` or `--minutes`, whichever comes first, and the schedule follows the nearer end, so
    that a slow machine finishes in time and with a rate of zero as well.
    """
    torch.manual_seed(args.seed)
    model, processor = Contrast(make_vision(args.patch_size)), make_image_processor()
    optimizers, start = make_optimizers(model, args.learning_rate), time.perf_counter()
    bar = tqdm(range(args.steps), desc="pretraining", mininterval=5)
    for step in bar:
        progress = max(step / args.steps, (time.perf_counter() - start) / 60 / args.minutes)
        if progress >= 1:
            break
        # Few colours in a batch: the colour alone does not find the caption then, and shapes must be learnt.
        images, captions, regions = make_batch(args.batch_size, seed=args.seed * 1_000_000 + step, colors=4)
        losses = model(normalise(images, processor), captions, regions)
        model.zero_grad()
        losses.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, highest in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(progress, highest)
            optimizer.step()
        if step % 20 == 0:
            patches, by_class, regions = (f"{loss:.2f}" for loss in losses.tolist())
            bar.set_postfix(patches=patches, CLS=by_class, regions=regions)
    return model


@torch.no_grad()
def own_retrieval(model, batches=8):
    """Top-1 among 256 held-out captions with the text tower of the training, by patches and by CLS."""
    processor, shares = make_image_processor(), []
    for number in range(batches):
        images, captions, _ = make_batch(256, seed=HELD_OUT_SEED + number)
        text = model.text(captions)
        shares.append([top1(image, text) for image in model.encode_images(normalise(images, processor))[1:]])
    return torch.tensor(shares).mean(0).tolist()


def save(model, folder):
    """Encoder in bfloat16 and image processor, as `from_pretrained` reads them."""
    model.vision.to(torch.bfloat16).save_pretrained(folder)
    make_image_processor().save_pretrained(folder)


# Evaluation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def patch_features(vision, images):
    """uint8 [N, 64, 64, 3] to the patch features of the layer before the last, float [N, P, H]."""
    processor = make_image_processor()
    chunks = [normalise(chunk, processor) for chunk in images.split(250)]
    return torch.cat([vision(chunk, output_hidden_states=True).hidden_states[-2][:, 1:] for chunk in chunks])


def standardise(train_features, test_features):
    """Both with mean 0 and deviation 1 in every column, by the numbers of the first."""
    mean, std = train_features.mean(0), train_features.std(0).clamp(min=1e-6)
    return (train_features - mean) / std, (test_features - mean) / std


def linear_probe(train_features, train_labels, test_features, test_labels, penalty=1e-3):
    """Test accuracy of logistic regression, features [N, F], labels [N]; `penalty` weighs the squared weights."""
    train_features, test_features = standardise(train_features, test_features)
    weight = torch.zeros(train_features.shape[1], int(train_labels.max()) + 1, requires_grad=True)
    bias = torch.zeros(weight.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(train_features @ weight + bias, train_labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return ((test_features @ weight + bias).argmax(1) == test_labels).float().mean().item()


def read_easy_vqa(questions, paths, kind):
    """Images uint8 [N, 64, 64, 3] and their words [N] of one kind, "color" or "shape".

    The words are the answers to the open questions; an image without a question of that kind is left out.
    """
    shapes, found = {"circle", "rectangle", "triangle"}, {}
    for answer, image in zip(*questions[1:], strict=True):
        if answer not in ("yes", "no") and (answer in shapes) == (kind == "shape"):
            found[image] = answer
    raw = b"".join(Image.open(paths[image]).convert("RGB").tobytes() for image in found)
    images = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(len(found), IMAGE_SIZE, IMAGE_SIZE, 3)
    return images, list(found.values())


def probe_easy_vqa(vision, kind):
    """Two test accuracies of probes trained on easy-VQA's train images, and the numbers of train and test images.

    The first probe reads the mean of the patches [N, H], the second all patches side by side [N, P * H].
    """
    import easy_vqa

    images, words = read_easy_vqa(easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths(), kind)
    test_images, test_words = read_easy_vqa(easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths(), kind)
    names = sorted(set(words))
    labels, test_labels = (torch.tensor([names.index(word) for word in part]) for part in (words, test_words))
    features, test_features = patch_features(vision, images), patch_features(vision, test_images)
    pooled = linear_probe(features.mean(1), labels, test_features.mean(1), test_labels)
    flattened = linear_probe(features.flatten(1), labels, test_features.flatten(1), test_labels)
    return pooled, flattened, (len(images), len(test_images))


def probe_retrieval(vision, scenes=8192, steps=600, batches=8):
    """Top-1 among 256 held-out captions, over the frozen encoder: a linear head on its flattened patches and a new
    text tower learn with the CLIP loss on other scenes. Chance is 1 / 256."""
    images, captions, _ = make_batch(scenes, seed=HELD_OUT_SEED - 1)
    tests = [make_batch(256, seed=HELD_OUT_SEED + number) for number in range(batches)]
    test_images = torch.cat([images for images, *_ in tests])
    features, test_features = (patch_features(vision, i).flatten(1) for i in (images, test_images))
    features, test_features = standardise(features, test_features)
    torch.manual_seed(0)
    text, head = TextTower(), nn.Linear(features.shape[1], JOINT_SIZE)
    optimizer = torch.optim.AdamW([*text.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.1)
    for _ in tqdm(range(steps), desc="retrieval heads", mininterval=5, leave=False):
        chosen = torch.randperm(scenes)[:256].tolist()
        loss = clip_loss(F.normalize(head(features[chosen]), dim=-1), text([captions[i] for i in chosen]), 1 / 0.07)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        parts = zip(test_features.split(256), tests, strict=True)
        return sum(top1(head(part), text(words)) for part, (_, words, _) in parts) / batches


def print_row(name, *shares):
    print(f"| {name} | " + " | ".join(f"{share:.1%}" for share in shares) + " |", flush=True)


def evaluate(folder):
    """Print the measurements of the encoder in `folder` beside those of the same architecture untrained."""
    trained = CLIPVisionModel.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    untrained = CLIPVisionModel(trained.config).eval()
    print("| measure | trained | untrained | chance |\n|---|---|---|---|")
    for kind, classes in (("color", 8), ("shape", 3)):
        results = [probe_easy_vqa(vision, kind) for vision in (trained, untrained)]
        pooled, flattened, ((seen, tested), _) = zip(*results, strict=True)
        print_row(f"easy-VQA {kind} ({seen} train, {tested} test images), mean patch", *pooled, 1 / classes)
        print_row(f"easy-VQA {kind}, flattened patches", *flattened, 1 / classes)
    print_row("rendered scenes, caption retrieval, top-1 of 256", *map(probe_retrieval, (trained, untrained)), 1 / 256)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--output", type=Path, help="train, and save encoder and image processor to this folder")
    action.add_argument("--evaluate", type=Path, metavar="FOLDER", help="measure the encoder saved in this folder")
    parser.add_argument("--steps", type=int, default=2450, help="training steps (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end earlier (default: never)")
    parser.add_argument("--batch-size", type=int, default=128, help="scenes in a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="highest rate (default: %(default)s)")
    parser.add_argument("--patch-size", type=int, default=16, help="pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and scenes (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    return parser.parse_args()


def main():
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if args.evaluate:
        return evaluate(args.evaluate)
    start = time.perf_counter()
    model = train(args)
    by_patches, by_class = own_retrieval(model)
    save(model, args.output)
    print(f"trained in {(time.perf_counter() - start) / 60:.1f} minutes")
    print(
        f"held-out captions, top-1 of 256: {by_patches:.1%} by patches, {by_class:.1%} by CLS (chance {1 / 256:.1%})"
    )


if __name__ == "__main__":
    main()
