"""Pretrain the small Whisper encoder of `assets/tiny-speech` on words that espeak-ng speaks.

    apt-get install espeak-ng
    python assets/pretrain_speech.py --output assets/tiny-speech      # train and save
    python assets/pretrain_speech.py --evaluate assets/tiny-speech    # measure, beside an untrained encoder

The words are 50 common ones, digits as often as all others together; the voices, and those that are held out, are of
examples/spoken_words_data.py. Training is CTC over words, the word at every position of clips that have just one (it
tells early what CTC finds out late), and the speaker's sex at every position of speech.

Letters in the shapes: B batch, F mel frames (200), P positions (100, 20 ms each), H hidden size (128).
"""

import argparse
import math
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.signal import resample_poly
from torch import nn
from tqdm import tqdm
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from spoken_words_data import DIGITS, HELD_OUT, VOICES, check_espeak, draw, speak

SECONDS = 2
SAMPLING_RATE = 16000
OTHERS = tuple(
    "red green blue black white cat dog bird fish horse house door window table chair water bread milk apple morning "
    "evening river mountain city garden doctor teacher mother father paper music left right up down yes no stop go "
    "open"
    .split()
)  # fmt: skip
WORDS = (*DIGITS, *OTHERS)
SPEAKERS = ("man", "woman")


def make_encoder():
    return WhisperEncoder(
        WhisperConfig(
            d_model=128,
            encoder_layers=3,
            encoder_attention_heads=4,
            encoder_ffn_dim=512,
            num_mel_bins=80,
            max_source_positions=50 * SECONDS,
            dropout=0.0,
            decoder_layers=0,  # there is none
        )
    )


def make_feature_extractor():
    return WhisperFeatureExtractor(feature_size=80, sampling_rate=SAMPLING_RATE, chunk_length=SECONDS)


def make_clips(number, voices, seed, words=WORDS):
    """[(int16 samples at 16 kHz, word indices, speaker)]: one to three words each, of at most `SECONDS`, the shortest
    first."""
    generator, weights = random.Random(seed), [1 if word in OTHERS else 4 for word in words]
    numbers = generator.choices((1, 2, 3), (2, 1, 1), k=number)
    texts = [generator.choices(words, weights, k=k) for k in numbers]
    for text in texts:
        if len(text) > 1 and generator.random() < 0.2:  # a word that is said twice is what is missed most
            text[1] = text[0]
    clips = [draw(generator, tuple(text), voices) for text in texts]
    with ThreadPoolExecutor(2) as pool:
        spoken = list(tqdm(pool.map(spoken_at_16k, clips), total=number, desc="speaking", mininterval=5))
    kept = [(samples, clip) for samples, clip in zip(spoken, clips, strict=True) if len(samples) <= SECONDS * 15000]
    kept.sort(key=lambda pair: len(pair[0]))
    return [(s, [WORDS.index(word) for word in clip.words], SPEAKERS.index(clip.speaker)) for s, clip in kept]


def spoken_at_16k(clip):
    return (resample_poly(speak(clip), 320, 441) * 2**14).astype(np.int16)  # 320 / 441 = 16,000 / 22,050


def waveforms(clips, generator):
    """float32 [B, samples], each clip at the start of its `SECONDS`, with loudness, noise and a filter of its own, and
    (first, stop) of its speech."""
    spans, batch = [], np.zeros((len(clips), SECONDS * SAMPLING_RATE), dtype=np.float32)
    for row, (samples, *_) in zip(batch, clips, strict=True):
        samples = samples / 2**15
        tilt = generator.uniform(-0.5, 0.5)  # first-order filter: brighter or darker
        samples[1:] = samples[1:] - tilt * samples[:-1]
        speed = generator.uniform(max(0.88, len(samples) / len(row)), 1.14)  # and pitch with it
        times = np.arange(0, len(samples) - 1, speed)
        samples = np.interp(times, np.arange(len(samples)), samples)[: len(row)]
        start = generator.integers(0, min(len(row) - len(samples), SAMPLING_RATE // 10) + 1)
        spans.append((start, start + len(samples)))
        row[start : start + len(samples)] = samples
        noise = generator.standard_normal(start + len(samples)) * samples.std() * generator.uniform(0, 0.2)
        row[: start + len(samples)] += noise
        row *= generator.uniform(0.2, 2)
    return batch, spans


def features(batch, extractor):
    """float32 [B, samples] to log-mel frames [B, 80, F]."""
    return extractor(list(batch), sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features


class Listener(nn.Module):
    """Encoder and three heads, of each position, which are not kept."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.words = nn.Linear(encoder.config.d_model, len(WORDS) + 1)  # the last: CTC's blank
        self.word = nn.Linear(encoder.config.d_model, len(WORDS) + 1)  # at a position; the last: none
        self.speaker = nn.Linear(encoder.config.d_model, len(SPEAKERS))

    def hidden(self, frames):
        """[B, 80, F] -> [B, P, H], as the encoder's own forward, which takes no fewer frames than `SECONDS` have."""
        encoder = self.encoder
        hidden = F.gelu(encoder.conv2(F.gelu(encoder.conv1(frames)))).transpose(1, 2)
        hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
        for layer in encoder.layers:
            hidden = layer(hidden, None)
        return encoder.layer_norm(hidden)

    def forward(self, frames):
        """[B, 80, F] -> log-probabilities of words [B, P, W + 1], twice, and of speakers [B, P, 2]."""
        hidden = self.hidden(frames)
        return tuple(head(hidden).log_softmax(-1) for head in (self.words, self.word, self.speaker))


def loss_of(model, frames, clips, spans):
    """Losses in nats: CTC a word, the word at a position, the speaker at one. `spans`: (first, stop) samples of
    speech."""
    words, word, speakers = model(frames)
    lengths = torch.tensor([len(target) for _, target, _ in clips])
    targets = torch.tensor([one for _, target, _ in clips for one in target])
    positions = torch.full_like(lengths, words.shape[1])
    ctc = F.ctc_loss(words.transpose(0, 1), targets, positions, lengths, blank=len(WORDS), zero_infinity=True)
    single = [index for index, (_, target, _) in enumerate(clips) if len(target) == 1]
    place = torch.arange(words.shape[1]) * 320  # samples a position
    spoken = torch.stack([(place >= first) & (place < stop) for first, stop in spans])
    labels = torch.where(spoken, torch.tensor([target[0] for _, target, _ in clips]).unsqueeze(1), len(WORDS))
    at_position = F.nll_loss(word[single].flatten(0, 1), labels[single].flatten()) if single else ctc * 0
    who = torch.tensor([speaker for *_, speaker in clips]).unsqueeze(1).expand_as(spoken)
    return ctc, at_position, F.nll_loss(speakers[spoken], who[spoken])


def mask_some(frames, generator):
    """SpecAugment: a band of mel bins and a stretch of time set to the mean of their clip."""
    for row in frames:
        low, start = generator.integers(0, 72), generator.integers(0, frames.shape[2] - 8)
        row[low : low + generator.integers(0, 8)] = row.mean()
        row[:, start : start + generator.integers(0, 8)] = row.mean()
    return frames


def train(args):
    """The model, after `--steps` or `--minutes`; the schedule follows the nearer end."""
    torch.manual_seed(args.seed)
    clips = make_clips(args.clips, VOICES, args.seed)
    encoder = WhisperEncoder.from_pretrained(args.init, dtype=torch.float32) if args.init else make_encoder()
    model, extractor, generator = Listener(encoder), make_feature_extractor(), np.random.default_rng(args.seed)
    matrices = [p for name, p in model.encoder.named_parameters() if p.ndim == 2 and "layers" in name]
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in set(map(id, matrices))]
    muon = torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.01)
    optimizers, start = [(muon, 5 * args.learning_rate), (adam, args.learning_rate)], time.perf_counter()
    bar = tqdm(range(args.steps), desc="pretraining", mininterval=5)
    for step in bar:
        progress = max(step / args.steps, (time.perf_counter() - start) / 60 / args.minutes)
        if progress >= 1:
            break
        first = generator.integers(0, len(clips) - 4 * args.batch_size)  # clips of about one length
        batch = [clips[first + index] for index in generator.choice(4 * args.batch_size, args.batch_size, False)]
        samples, spans = waveforms(batch, generator)
        frames = features(samples, extractor)
        if progress < 0.8 and generator.random() < 0.7:  # most steps without the silence behind the longest
            frames = frames[:, :, : 2 * (max(stop for _, stop in spans) // 320 + 2)]
        losses = loss_of(model, mask_some(frames, generator), batch, spans)
        model.zero_grad()
        (losses[0] + losses[1] + losses[2]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, highest in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = highest * min(1.0, 0.01 + 20 * progress) * 0.5 * (1 + math.cos(math.pi * progress))
            optimizer.step()
        bar.set_postfix(
            {name: f"{loss.item():.3f}" for name, loss in zip(("CTC", "word", "speaker"), losses, strict=True)}
        )
    return model


@torch.no_grad()
def held_out_accuracy(model, number, words=WORDS):
    """Shares of clips by held-out voices: of which CTC's best path gives every word, and no other; of which most
    positions give the speaker."""
    clips, right, known = make_clips(number, HELD_OUT, 10_000_019, words), 0, 0
    for start in range(0, len(clips), 64):
        part = clips[start : start + 64]
        samples, spans = waveforms(part, np.random.default_rng(0))
        paths, _, who = (one.argmax(-1) for one in model(features(samples, make_feature_extractor())))
        for path, speakers, (first, stop), (_, target, speaker) in zip(paths, who, spans, part, strict=True):
            right += [word for word in path.unique_consecutive().tolist() if word < len(WORDS)] == target
            known += speakers[first // 320 : stop // 320].mode().values.item() == speaker
    return right / len(clips), known / len(clips)


def save(model, folder):
    """Encoder in bfloat16 and feature extractor, as `from_pretrained` reads them."""
    model.encoder.to(torch.bfloat16).save_pretrained(folder)
    make_feature_extractor().save_pretrained(folder)


def probe(encoder, clips, held_out, label_of, classes):
    """Accuracy on `held_out` clips of a softmax regression over the mean and the maximum of all positions."""
    extractor, tables = make_feature_extractor(), []
    with torch.no_grad():
        for part in (clips, held_out):
            chunks = [part[start : start + 64] for start in range(0, len(part), 64)]
            frames = (features(waveforms(chunk, np.random.default_rng(0))[0], extractor) for chunk in chunks)
            hidden = torch.cat([encoder(chunk).last_hidden_state for chunk in frames])
            tables.append(torch.cat([hidden.mean(1), hidden.amax(1)], dim=1))
    mean, std = tables[0].mean(0), tables[0].std(0).clamp(min=1e-6)
    seen, unseen = ((table - mean) / std for table in tables)
    labels, expected = (torch.tensor([label_of(clip) for clip in part]) for part in (clips, held_out))
    head = nn.Linear(seen.shape[1], classes)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(seen), labels) + 1e-3 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (head(unseen).argmax(1) == expected).float().mean().item()


def evaluate(folder):
    """Print probes over the encoder in `folder` beside those of the same architecture untrained."""
    trained = WhisperEncoder.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    untrained = WhisperEncoder(trained.config).eval()
    clips, held_out = make_clips(3000, VOICES, 1), make_clips(1000, HELD_OUT, 2)
    print("| probe, held-out voices | trained | untrained | chance |\n|---|---|---|---|")
    for name, label_of, classes in (
        ("number of words", lambda clip: len(clip[1]) - 1, 3),
        ("speaker", lambda clip: clip[2], 2),
    ):
        shares = [probe(encoder, clips, held_out, label_of, classes) for encoder in (trained, untrained)]
        print(f"| {name} | " + " | ".join(f"{share:.1%}" for share in (*shares, 1 / classes)) + " |", flush=True)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--output", type=Path, help="train, and save encoder and feature extractor to this folder")
    action.add_argument("--evaluate", type=Path, metavar="FOLDER", help="measure the encoder saved in this folder")
    parser.add_argument("--init", type=Path, metavar="FOLDER", help="go on from the encoder saved in this folder")
    parser.add_argument("--clips", type=int, default=16000, help="spoken for training (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3000, help="training steps (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end earlier (default: never)")
    parser.add_argument("--batch-size", type=int, default=32, help="clips in a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="highest rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and clips (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    return parser.parse_args()


def main():
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    check_espeak()
    if args.evaluate:
        return evaluate(args.evaluate)
    start = time.perf_counter()
    model = train(args).eval()
    shares, digits = (held_out_accuracy(model, 1000, words) for words in (WORDS, DIGITS))
    save(model, args.output)
    print(f"trained in {(time.perf_counter() - start) / 60:.1f} minutes")
    print(f"clips by held-out voices of which every word is right: {shares[0]:.1%}, of digits alone {digits[0]:.1%}")
    print(f"of which the speaker is right: {shares[1]:.1%}, of digits alone {digits[1]:.1%}")


if __name__ == "__main__":
    main()
