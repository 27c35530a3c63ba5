"""Tests of filling the cache: keyed by content, in batches, by several processes, and of damaged entries."""

import logging
import multiprocessing
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from halfbyte.trainer.data.cache.encodings import LatentCache, TextCache, encode_missing
from halfbyte.trainer.data.cache.store import store_of
from halfbyte.trainer.data.views.buckets import View
from halfbyte.trainer.errors import DataError, DiskError
from halfbyte.trainer.families.embedding import LatentMoments, TextEmbedding

from counting_encoders import (
    CountingEncoders,
    captions_of,
    change_byte,
    embedding_of,
    entry_bytes,
    move_to_files,
    place_of,
    replace_entry,
    views_in,
    write_pictures,
)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "pictures")


def encoded_again(cache: Path, views: list[View]) -> tuple[int, int]:
    """Fills the cache and returns how many images and captions that took."""
    encoders = CountingEncoders()
    encode_missing(cache, encoders, views, captions_of(views))
    return len(encoders.pictures), len(encoders.captions)


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

    def test_the_files_do_not_grow_in_number_with_the_images(self, pictures: Path, tmp_path: Path) -> None:
        views = views_in(pictures, crop="random", aspect_buckets=False, random_crops=6)
        encode_missing(tmp_path / "cache", CountingEncoders(), views, captions_of(views))
        files = sorted(file.suffix for file in (tmp_path / "cache").rglob("*") if file.is_file())
        assert files == [".index", ".index", ".shard", ".shard"]

    def test_a_second_start_encodes_nothing(self, pictures: Path, tmp_path: Path) -> None:
        views = views_in(pictures)
        assert encoded_again(tmp_path / "cache", views) == (4, 5)
        assert encoded_again(tmp_path / "cache", views) == (0, 0)

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

    def test_each_thing_that_determines_an_entry_makes_another_one(
        self, pictures: Path, tmp_path: Path
    ) -> None:
        cache = tmp_path / "cache"
        view, *others = views_in(pictures)
        encode_missing(cache, CountingEncoders(), [view, *others], ["cap"])
        variants = [
            replace(view, box=(0, 0, 32, 24)),
            replace(view, width=16),
            replace(view, height=48),
            replace(view, flip=True),
            replace(view, sample=replace(view.sample, misnamed_profile=True)),
        ]
        for number, variant in enumerate(variants, start=1):
            encoders = CountingEncoders()
            encode_missing(cache, encoders, [view, *others, *variants[:number]], ["cap"])
            assert encoders.pictures == [(3, variant.height, variant.width)]
            assert encoders.captions == []
        for fingerprints, made in ((("vae2", "text1"), (4, 0)), (("vae1", "text2"), (0, 2))):
            encoders = CountingEncoders(*fingerprints)
            encode_missing(cache, encoders, [view, *others], ["cap"])
            assert (len(encoders.pictures), len(encoders.captions)) == made
        keys = {LatentCache(cache, name).key(one) for name in "xy" for one in (view, *variants)}
        assert len(keys) == 12
        renamed = replace(view, sample=replace(view.sample, path=Path("other"), caption="other", index=9))
        assert LatentCache(cache, "x").key(renamed) in keys
        texts = {TextCache(cache, name).key(caption) for name in "xy" for caption in ("", "a", "b")}
        assert len(texts) == 6

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

    def test_batches_are_filled_up_and_give_the_same_entries(self, pictures: Path, tmp_path: Path) -> None:
        views = views_in(pictures)
        seen: list[tuple[int, int]] = []
        filled = []
        for size in (1, 3):
            encoders = CountingEncoders(batch=size)
            filled.append(
                encode_missing(
                    tmp_path / str(size),
                    encoders,
                    views,
                    captions_of(views),
                    progress=lambda done, total: seen.append((done, total)),
                )
            )
        assert len(encoders.pictures) == 6, "two batches of three"
        assert encoders.captions[3:] == ["cap c", "cap d", "cap d"]
        assert seen[0] == (0, 9)
        assert seen[-1] == (9, 9)
        (latents, texts), (others, other_texts) = filled
        for view in views:
            assert entry_bytes(latents, view) == entry_bytes(others, view)
            assert entry_bytes(texts, view.sample.caption) == entry_bytes(other_texts, view.sample.caption)

    def test_a_batch_is_halved_if_the_device_is_full(
        self, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Small(CountingEncoders):
            def encode_images(self, pixels: Tensor) -> LatentMoments:
                if len(pixels) > 2:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return super().encode_images(pixels)

        views = views_in(pictures)
        with caplog.at_level(logging.WARNING):
            latents, _ = encode_missing(tmp_path / "cache", Small(batch=8), views, [])
        assert latents.missing(views) == []
        assert [record.args for record in caplog.records] == [(8, 4), (4, 2)]

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

    @pytest.mark.parametrize("processes", [2, 4])
    def test_processes_can_fill_one_cache_concurrently(
        self, pictures: Path, tmp_path: Path, processes: int
    ) -> None:
        """Each has its share, and one more process, of another run, has everything."""
        views = views_in(pictures, crop="random", aspect_buckets=False, random_crops=6)
        cache = tmp_path / "cache"
        context = multiprocessing.get_context("fork")
        shares = [{"rank": rank, "world_size": processes} for rank in range(processes)]
        workers = [
            context.Process(
                target=encode_missing,
                args=(cache, CountingEncoders(), views, captions_of(views)),
                kwargs=share,
            )
            for share in [*shares, {}]
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=120)
        assert {worker.exitcode for worker in workers} == {0}
        assert encoded_again(cache, views) == (0, 0)
        assert list(cache.rglob("*.partial")) == []

    def test_worker_processes_decode_the_same_pixels(self, pictures: Path, tmp_path: Path) -> None:
        views = views_in(pictures, flip=True)
        plain, _ = encode_missing(tmp_path / "plain", CountingEncoders(), views, [])
        workers, _ = encode_missing(tmp_path / "workers", CountingEncoders(batch=2), views, [], workers=1)
        for view in views:
            assert entry_bytes(plain, view) == entry_bytes(workers, view)
        (pictures / "a.png").write_bytes(b"changed")
        with pytest.raises(DataError, match=r"a\.png: changed since the run was started"):
            encode_missing(tmp_path / "again", CountingEncoders(), views, [], workers=1)

    @pytest.mark.gpu
    def test_entries_of_a_device_are_copied_while_it_goes_on(self, pictures: Path, tmp_path: Path) -> None:
        class OnDevice(CountingEncoders):
            device = torch.device("cuda")

            def encode_images(self, pixels: Tensor) -> LatentMoments:
                torch.cuda._sleep(10**8)  # so that an unfinished copy would be written
                return super().encode_images(pixels)

            def encode_texts(self, captions: Sequence[str]) -> TextEmbedding:
                made = super().encode_texts(captions)
                torch.cuda._sleep(10**8)
                return TextEmbedding(made.prompt_embeds.cuda(), made.pooled_prompt_embeds.cuda())

        views = views_in(pictures, flip=True)
        plain = encode_missing(tmp_path / "cpu", CountingEncoders(), views, captions_of(views))
        found = encode_missing(tmp_path / "cuda", OnDevice(batch=2), views, captions_of(views))
        for view in views:
            assert torch.allclose(plain[0].read(view).mean, found[0].read(view).mean, atol=1e-6)
            caption = view.sample.caption
            assert entry_bytes(plain[1], caption) == entry_bytes(found[1], caption)

    def test_nan_is_refused_with_the_name_of_the_image(self, pictures: Path, tmp_path: Path) -> None:
        class Overflowing(CountingEncoders):
            def encode_images(self, pixels: Tensor) -> LatentMoments:
                moments = super().encode_images(pixels)
                return LatentMoments(moments.mean / 0, moments.std)

        with pytest.raises(DataError, match=r"a\.png: the VAE .*NaN.*mean"):
            encode_missing(tmp_path / "cache", Overflowing(), views_in(pictures), [])
        assert list((tmp_path / "cache" / "latents").rglob("*")) == []

    def test_what_was_encoded_before_an_error_is_kept(self, pictures: Path, tmp_path: Path) -> None:
        class Interrupted(CountingEncoders):
            def encode_images(self, pixels: Tensor) -> LatentMoments:
                if len(self.pictures) == 2:
                    raise KeyboardInterrupt
                return super().encode_images(pixels)

        views = views_in(pictures)
        with pytest.raises(KeyboardInterrupt):
            encode_missing(tmp_path / "cache", Interrupted(), views, captions_of(views))
        assert encoded_again(tmp_path / "cache", views) == (2, 0)

    def test_a_cache_that_cannot_be_written(self, pictures: Path, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("a file", encoding="utf-8")
        with pytest.raises(DiskError, match=f"cache entries into {tmp_path}"):
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
        latents, _ = encode_missing(cache, CountingEncoders(), views[:1], [])
        assert LatentCache.has_decoded(cache, views[0].sample.sha256)
        assert not LatentCache.has_decoded(cache, views[1].sample.sha256)
        move_to_files(latents, views[:1])
        assert LatentCache.has_decoded(cache, views[0].sample.sha256)
        assert not LatentCache.has_decoded(cache, views[1].sample.sha256)


class TestOlderVersions:
    def test_entries_in_files_are_read_where_they_are(self, pictures: Path, tmp_path: Path) -> None:
        views = views_in(pictures)
        cache = tmp_path / "cache"
        latents, texts = encode_missing(cache, CountingEncoders(), views, captions_of(views))
        before = [(latents.read(view).mean, texts.read(view.sample.caption).prompt_embeds) for view in views]
        files = [*move_to_files(latents, views), *move_to_files(texts, ["", *captions_of(views)])]
        encoders = CountingEncoders()
        latents, texts = encode_missing(cache, encoders, views, [*captions_of(views), "new"])
        assert (encoders.pictures, encoders.captions) == ([], ["new"])
        for view, (mean, embeds) in zip(views, before, strict=True):
            assert torch.equal(latents.read(view).mean, mean)
            assert torch.equal(texts.read(view.sample.caption).prompt_embeds, embeds)
        assert all(file.is_file() for file in files)

    def test_a_damaged_file_is_replaced_by_an_entry_in_a_shard(
        self, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        views = views_in(pictures)
        cache = tmp_path / "cache"
        latents, _ = encode_missing(cache, CountingEncoders(), views, captions_of(views))
        file = move_to_files(latents, views)[1]
        data = bytearray(file.read_bytes())
        data[-3] ^= 4
        file.write_bytes(data)
        with caplog.at_level(logging.WARNING):
            assert encoded_again(cache, views) == (1, 0)
        assert "b.png" in caplog.text
        assert encoded_again(cache, views) == (0, 0)


class TestDamage:
    @pytest.fixture
    def filled(self, pictures: Path, tmp_path: Path) -> tuple[Path, list[View]]:
        views = views_in(pictures)
        encode_missing(tmp_path / "cache", CountingEncoders(), views, captions_of(views))
        return tmp_path / "cache", views

    @pytest.mark.parametrize("kind", ["latents", "texts"])
    @pytest.mark.parametrize("damage", ["content", "header", "foreign", "cut"])
    def test_damaged_entries_are_encoded_again_with_a_warning(
        self, filled: tuple[Path, list[View]], kind: str, damage: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        path, views = filled
        latents, texts = LatentCache(path, "vae1"), TextCache(path, "text1")
        # The last ones in their shards.
        view = max(views, key=lambda view: place_of(latents, view).offset)
        cache, item = (latents, view) if kind == "latents" else (texts, "cap d")
        intact = entry_bytes(cache, item)
        if damage == "foreign":
            replace_entry(cache, item, {"other": torch.zeros(3)})
        elif damage == "cut":
            shard = place_of(cache, item).shard
            shard.write_bytes(shard.read_bytes()[:-5])
        else:
            change_byte(cache, item, -3 if damage == "content" else 20)
        store_of.cache_clear()
        with caplog.at_level(logging.WARNING):
            encoders = CountingEncoders()
            encode_missing(path, encoders, views, captions_of(views))
        # An entry that was replaced by a wrong one still exists.
        made = 0 if damage == "foreign" else 1
        assert len(encoders.pictures) + len(encoders.captions) == made
        assert ("is damaged" in caplog.text) == (damage in ("content", "header"))
        assert entry_bytes(cache, item) == intact
        caplog.clear()
        assert encoded_again(path, views) == (0, 0)
        assert caplog.text == ""

    def test_large_caches_are_not_read_at_the_start(
        self, filled: tuple[Path, list[View]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Their damage is found in training, noted, and repaired by the next start."""
        cache, views = filled
        monkeypatch.setattr("halfbyte.trainer.data.cache.entry_cache.VERIFIED_BYTES", 100)
        latents = LatentCache(cache, "vae1")
        change_byte(latents, views[1])
        assert encoded_again(cache, views) == (0, 0)
        with pytest.raises(DataError, match=r"b\.png: .*damaged.*start again"):
            latents.read(views[1])
        store_of.cache_clear()  # as in another process
        assert encoded_again(cache, views) == (1, 0)
        assert LatentCache(cache, "vae1").read(views[1]).mean.isfinite().all()

    def test_reading_a_missing_or_damaged_entry_says_what_to_do(
        self, filled: tuple[Path, list[View]]
    ) -> None:
        cache, views = filled
        latents = LatentCache(cache, "vae1")
        change_byte(latents, views[0])
        with pytest.raises(DataError, match=r"a\.png: .*damaged.*start again"):
            latents.read(views[0])
        shutil.rmtree(cache / "latents")
        with pytest.raises(DataError, match=r"a\.png: .*start again"):
            latents.read(views[0])
        with pytest.raises(DataError, match=r"'unknown': .*start again"):
            TextCache(cache, "text1").read("unknown")
