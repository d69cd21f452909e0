"""Image folders, tars and shards of a few images, for tests of data."""

import io
import shutil
import tarfile

from PIL import Image

CLASSES = ("blue", "green", "red")


def tar_of(path, files):
    """A tar of (name, content or file)."""
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            content = content if isinstance(content, bytes) else content.read_bytes()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def images_of(folder, split):
    return sorted((folder / split).rglob("*.jpg"))


def one_tar_a_split(folder, into):
    into.mkdir()
    for split in ("train", "val"):
        files = [(f"{path.parent.name}/{path.name}", path) for path in images_of(folder, split)]
        tar_of(into / f"{split}.tar", files)
    return into


def one_tar_a_class(folder, into):
    for split in ("train", "val"):
        (into / split).mkdir(parents=True)
        for name in CLASSES:
            files = [(path.name, path) for path in sorted((folder / split / name).iterdir())]
            tar_of(into / split / f"{name}.tar", files)
    return into


def one_tar_of_tars(folder, into):
    one_tar_a_class(folder, into)
    for split in ("train", "val"):
        inner = [(path.name, path) for path in sorted((into / split).iterdir())]
        tar_of(into / f"{split}.tar", inner)
        shutil.rmtree(into / split)
    return into


def write_shards(folder, into, labels=True, size=4):
    """Shards that only their names tell apart, the images in them sorted by name."""
    into.mkdir()
    for split in ("train", "val"):
        paths = images_of(folder, split)
        for start in range(0, len(paths), size):
            files = []
            for path in paths[start : start + size]:
                key = f"{path.parent.name}/{path.stem}"
                files.append((f"{key}.jpg", path))
                if labels:
                    files.append((f"{key}.cls", str(CLASSES.index(path.parent.name)).encode()))
            tar_of(into / f"made-{split}-{start:04}.tar", files)
    return into


def contents(dataset):
    """(label, hash of the pixels) of all samples, in no order."""
    return sorted(
        (label, hash(image.tobytes()))
        for image, label in map(dataset.__getitem__, range(len(dataset)))
    )


def both_splits(root, *names):
    """Folders of one image under many names in both splits, and other files by their ending."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    for split in ("train", "val"):
        for name in names:
            path = root / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"text" if path.suffix in (".txt", ".mp4") else buffer.getvalue())
    return root


def both_tars(root, *names):
    """The same in train.tar and val.tar; a name that ends in a slash is a folder."""
    both_splits(root, *(name for name in names if name[-1] != "/"))
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as archive:
            for name in names:
                if name[-1] == "/":
                    info = tarfile.TarInfo(name[:-1])
                    info.type = tarfile.DIRTYPE
                    archive.addfile(info)
                else:
                    archive.add(root / split / name, name)
        shutil.rmtree(root / split)
    return root


def classes_and_labels(dataset):
    labels = [dataset[index][1] for index in range(len(dataset))]
    return dataset.reader.class_to_idx, labels


def shard_of(path, members):
    """A shard of members "name=content"; images where there is no content."""
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "JPEG")
    parts = (member.partition("=") for member in members)
    return tar_of(
        path, [(n, c.encode() if is_text else image.getvalue()) for n, is_text, c in parts]
    )
