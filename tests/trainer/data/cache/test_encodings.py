"""Tests of the cache on disk: keyed by content, written atomically, filled by several processes."""

import errno
import logging
import multiprocessing
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfbyte.trainer.data.cache.encodings import LatentCache, TextCache, encode_missing
from halfbyte.trainer.data.views.buckets import View
from halfbyte.trainer.errors import DataError, DiskError
from halfbyte.trainer.families.embedding import LatentMoments

from counting_encoders import CountingEncoders, captions_of, embedding_of, views_in, write_pictures


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "pictures")


def entries(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.safetensors"))


class TestFill:
    def test_entries_are_read_as_they_were_encoded(self, pictures: Path, tmp_path: Path) -> None:
        views = views_in(pictures)
        latents, texts = encode_missing(tmp_path / "cache", CountingEncoders(), views, captions_of(views))
        for number, view in enumerate(views):
            moments = latents.read(view)
            color = torch.tensor([60 * number, 255 - 60 * number, 30]) / 127.5 - 1
            assert moments.mean.dtype == moments.std.dtype == torch.float32
            assert moments.mean.shape == (1, 3, view.height // 8, view.width // 8)
            assert torch.allclose(moments.mean, color[None, :, None, None].expand_as(moments.mean))
            assert torch.allclose(moments.std, moments.mean.abs() + 0.1)
            embedding, wanted = texts.read(view.sample.caption), embedding_of([view.sample.caption])
            assert torch.equal(embedding.prompt_embeds, wanted.prompt_embeds)
            assert torch.equal(embedding.pooled_prompt_embeds, wanted.pooled_prompt_embeds)
            assert embedding.prompt_embeds.dtype == torch.bfloat16
        assert not texts.read("").prompt_embeds.any(), "the empty caption is always cached"

    def test_a_second_start_encodes_nothing(self, pictures: Path, tmp_path: Path) -> None:
        views = views_in(pictures)
        encode_missing(tmp_path / "cache", CountingEncoders(), views, captions_of(views))
        encoders = CountingEncoders()
        encode_missing(tmp_path / "cache", encoders, views, captions_of(views))
        assert (encoders.pictures, encoders.captions) == ([], [])

    def test_file_names_do_not_matter(self, pictures: Path, tmp_path: Path) -> None:
        views = views_in(pictures)
        encode_missing(tmp_path / "cache", CountingEncoders(), views, captions_of(views))
        moved = tmp_path / "moved"
        pictures.rename(moved)
        for kind in ("png", "txt"):  # a and b get new names; each keeps its caption
            (moved / f"a.{kind}").rename(moved / f"x.{kind}")
            (moved / f"b.{kind}").rename(moved / f"a.{kind}")
        views = views_in(moved)
        encoders = CountingEncoders()
        latents, texts = encode_missing(tmp_path / "cache", encoders, views, captions_of(views))
        assert (encoders.pictures, encoders.captions) == ([], [])
        for view in views:
            red = latents.read(view).mean[0, 0, 0, 0].item()
            letter = chr(int(texts.read(view.sample.caption).prompt_embeds[0, 4, 0].item()))
            assert round((red + 1) * 127.5) == 60 * "abcd".index(letter)

    def test_only_what_changed_is_encoded(self, pictures: Path, tmp_path: Path) -> None:
        views = views_in(pictures)
        encode_missing(tmp_path / "cache", CountingEncoders(), views, captions_of(views))
        Image.new("RGB", (64, 48), "white").save(pictures / "b.png")
        (pictures / "c.txt").write_text("cap z", encoding="utf-8")
        views = views_in(pictures)
        encoders = CountingEncoders()
        latents, texts = encode_missing(tmp_path / "cache", encoders, views, captions_of(views))
        assert len(encoders.pictures) == 1
        assert encoders.captions == ["cap z"]
        assert latents.read(views[1]).mean.eq(1).all()
        assert torch.equal(texts.read("cap z").prompt_embeds, embedding_of(["cap z"]).prompt_embeds)

    def test_the_key_covers_everything_that_determines_an_entry(self, pictures: Path, tmp_path: Path) -> None:
        view = views_in(pictures)[0]
        variants = [
            view,
            replace(view, box=(0, 0, 32, 24)),
            replace(view, width=16),
            replace(view, height=48),
            replace(view, flip=True),
            replace(view, sample=replace(view.sample, sha256="f" * 64)),
        ]
        paths = [LatentCache(tmp_path, fingerprint).path(v) for fingerprint in "xy" for v in variants]
        assert len(set(paths)) == len(paths)
        same = replace(view, sample=replace(view.sample, path=Path("other"), caption="other", index=9))
        assert LatentCache(tmp_path, "x").path(same) == paths[0]
        texts = [TextCache(tmp_path, fingerprint).path(c) for fingerprint in "xy" for c in ("", "a", "b")]
        assert len(set(texts)) == 6

    def test_flipped_views(self, pictures: Path, tmp_path: Path) -> None:
        left = Image.open(pictures / "d.png")
        left.paste("white", (0, 0, 32, 64))
        left.save(pictures / "d.png")
        plain, flipped = views_in(pictures, flip=True)[-2:]
        latents, _ = encode_missing(tmp_path / "cache", CountingEncoders(), [plain, flipped], [])
        assert torch.allclose(latents.read(plain).mean, latents.read(flipped).mean.flip(-1), atol=1e-6)
        assert not torch.allclose(latents.read(plain).mean, latents.read(flipped).mean, atol=0.5)

    def test_equal_images_and_captions_are_encoded_once(self, pictures: Path, tmp_path: Path) -> None:
        (pictures / "e.png").write_bytes((pictures / "a.png").read_bytes())
        (pictures / "e.txt").write_text("cap a", encoding="utf-8")
        views = views_in(pictures)
        encoders = CountingEncoders()
        encode_missing(tmp_path / "cache", encoders, views, captions_of(views))
        assert len(views) == 5
        assert len(encoders.pictures) == 4
        assert sorted(encoders.captions) == ["", "cap a", "cap b", "cap c", "cap d"]

    def test_the_batch_size_does_not_change_entries(self, pictures: Path, tmp_path: Path) -> None:
        views = views_in(pictures)
        seen: list[tuple[int, int]] = []
        for size in (1, 3):
            encode_missing(
                tmp_path / str(size),
                CountingEncoders(),
                views,
                captions_of(views),
                batch_size=size,
                progress=lambda done, total: seen.append((done, total)),
            )
        assert seen[0] == (0, 9)
        assert seen[-1] == (9, 9)
        one, three = (entries(tmp_path / str(size)) for size in (1, 3))
        assert [file.name for file in one] == [file.name for file in three]
        assert [file.read_bytes() for file in one] == [file.read_bytes() for file in three]

    def test_processes_share_the_work(self, pictures: Path, tmp_path: Path) -> None:
        views = views_in(pictures)
        shares = [CountingEncoders() for _ in range(3)]
        for rank, encoders in enumerate(shares):
            encode_missing(tmp_path / "cache", encoders, views, captions_of(views), rank=rank, world_size=3)
        assert sum(len(encoders.pictures) for encoders in shares) == 4
        encoded = [caption for encoders in shares for caption in encoders.captions]
        assert sorted(encoded) == sorted(["", *captions_of(views)])
        assert max(len(encoders.pictures) for encoders in shares) == 2
        assert LatentCache(tmp_path / "cache", "vae1").missing(views) == []

    def test_processes_can_fill_one_cache_concurrently(self, pictures: Path, tmp_path: Path) -> None:
        views = views_in(pictures, crop="random", aspect_buckets=False, random_crops=6)
        context = multiprocessing.get_context("fork")
        workers = [
            context.Process(
                target=encode_missing,
                args=(tmp_path / "cache", CountingEncoders(), views, captions_of(views)),
            )
            for _ in range(3)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=120)
        assert [worker.exitcode for worker in workers] == [0, 0, 0]
        assert LatentCache(tmp_path / "cache", "vae1").missing(views) == []
        assert list((tmp_path / "cache").rglob("*.partial")) == []

    def test_nan_is_refused_with_the_name_of_the_image(self, pictures: Path, tmp_path: Path) -> None:
        class Overflowing(CountingEncoders):
            def encode_images(self, pixels: Tensor) -> LatentMoments:
                moments = super().encode_images(pixels)
                return LatentMoments(moments.mean / 0, moments.std)

        with pytest.raises(DataError, match=r"a\.png: the VAE .*NaN.*mean"):
            encode_missing(tmp_path / "cache", Overflowing(), views_in(pictures), [])
        assert list((tmp_path / "cache" / "latents").rglob("*")) == []

    def test_a_cache_that_cannot_be_written(self, pictures: Path, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("a file", encoding="utf-8")
        with pytest.raises(DiskError, match=f"cache entry {tmp_path}"):
            encode_missing(tmp_path / "cache", CountingEncoders(), views_in(pictures), [])

    def test_a_disk_that_is_too_small_is_noticed_at_the_first_entry(
        self, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = shutil.disk_usage(tmp_path)._replace(free=600)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
        views = views_in(pictures)
        encoders = CountingEncoders()
        with pytest.raises(DiskError, match=r"cache .*600 B.*data\.cache_dir"):
            encode_missing(tmp_path / "cache", encoders, views, captions_of(views))
        assert len(encoders.captions) == 1

    def test_progress_includes_cached_entries(self, pictures: Path, tmp_path: Path) -> None:
        views = views_in(pictures)
        encode_missing(tmp_path / "cache", CountingEncoders(), views[:2], captions_of(views[:1]))
        seen: list[tuple[int, int]] = []
        encode_missing(
            tmp_path / "cache",
            CountingEncoders(),
            views,
            captions_of(views),
            progress=lambda done, total: seen.append((done, total)),
        )
        assert seen == [(done, 9) for done in range(10)]

    def test_encoded_images_are_known_to_decode(self, pictures: Path, tmp_path: Path) -> None:
        views = views_in(pictures)
        cache = tmp_path / "cache"
        assert not LatentCache.has_decoded(cache, views[0].sample.sha256)
        encode_missing(cache, CountingEncoders(), views[:1], [])
        assert LatentCache.has_decoded(cache, views[0].sample.sha256)
        assert not LatentCache.has_decoded(cache, views[1].sample.sha256)


class TestDamage:
    @pytest.fixture
    def filled(self, pictures: Path, tmp_path: Path) -> tuple[Path, list[View]]:
        views = views_in(pictures)
        encode_missing(tmp_path / "cache", CountingEncoders(), views, captions_of(views))
        return tmp_path / "cache", views

    @pytest.mark.parametrize("kind", ["latents", "texts"])
    @pytest.mark.parametrize("damage", ["truncated", "empty", "bit", "foreign", "junk"])
    def test_damaged_entries_are_encoded_again_with_a_warning(
        self, filled: tuple[Path, list[View]], kind: str, damage: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        cache, views = filled
        victim = entries(cache / kind)[1]
        intact = victim.read_bytes()
        if damage == "foreign":
            save_file({"other": torch.zeros(3)}, victim)
        else:
            victim.write_bytes(
                {
                    "truncated": intact[:-5],
                    "empty": b"",
                    "bit": intact[:-3] + bytes([intact[-3] ^ 4]) + intact[-2:],
                    "junk": b"\xff" * 100,
                }[damage]
            )
        encoders = CountingEncoders()
        with caplog.at_level(logging.WARNING):
            encode_missing(cache, encoders, views, captions_of(views))
        assert len(encoders.pictures) + len(encoders.captions) == 1
        assert str(victim) in caplog.text
        assert victim.read_bytes() == intact

    def test_reading_a_missing_or_damaged_entry_says_what_to_do(
        self, filled: tuple[Path, list[View]]
    ) -> None:
        cache, views = filled
        latents = LatentCache(cache, "vae1")
        latents.path(views[0]).write_bytes(b"damaged")
        with pytest.raises(DataError, match=r"a\.png: .*delete it and start again"):
            latents.read(views[0])
        latents.path(views[0]).unlink()
        with pytest.raises(DataError, match=r"a\.png: .*start again"):
            latents.read(views[0])
        with pytest.raises(DataError, match=r"'unknown': .*start again"):
            TextCache(cache, "text1").read("unknown")

    def test_an_interrupted_write_leaves_no_entry(self, filled: tuple[Path, list[View]]) -> None:
        cache, views = filled
        path = LatentCache(cache, "vae1").path(views[0])
        # A process killed while writing leaves the temporary file and no entry.
        path.rename(path.with_name(f".{path.stem}.1.partial"))
        assert LatentCache(cache, "vae1").missing(views) == views[:1]

    def test_an_entry_is_flushed_to_disk_before_it_is_renamed(
        self, filled: tuple[Path, list[View]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache, views = filled
        path = LatentCache(cache, "vae1").path(views[0])
        size = path.stat().st_size
        path.unlink()
        named: list[bool] = []
        sizes: list[int] = []

        def fsync(descriptor: int) -> None:
            named.append(path.exists())
            sizes.append(os.fstat(descriptor).st_size)

        monkeypatch.setattr(os, "fsync", fsync)
        encode_missing(cache, CountingEncoders(), views, [])
        assert named == [False]
        assert sizes == [size]
        assert path.exists()

    def test_a_failed_write_leaves_nothing(
        self, filled: tuple[Path, list[View]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache, views = filled
        LatentCache(cache, "vae1").path(views[0]).unlink()

        def fsync(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(DiskError, match=r"cache entry .*No space left on device"):
            encode_missing(cache, CountingEncoders(), views, [])
        assert len(entries(cache / "latents")) == 3
        assert list(cache.rglob("*.partial")) == []

    def test_entries_are_plain_safetensors(self, filled: tuple[Path, list[View]]) -> None:
        cache, views = filled
        tensors = load_file(LatentCache(cache, "vae1").path(views[0]))
        assert {name: tensor.dtype for name, tensor in tensors.items()} == {
            "mean": torch.float32,
            "std": torch.float32,
        }
