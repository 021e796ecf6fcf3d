"""Where compiled libraries are kept, and how one gets there.

A library's file is named by a fingerprint of its sources, flags and compiler, so a hit starts no compiler, an edit
never meets a stale file, and two versions live side by side. A miss compiles incrementally with ninja in a build
folder under a lock, and the result moves into place by one rename: processes that build at once wait for each other,
and none ever sees half a file.
"""

import functools
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from fusewright_kernels import toolchain
from fusewright_kernels.toolchain import Recipe, ToolchainError


class BuildError(RuntimeError):
    """A library cannot be built here; the message says why and what to do."""


@functools.cache
def directory() -> Path:
    """The cache: ``FUSEWRIGHT_CACHE_DIR``, else the XDG cache, else a folder of the system's temporary directory."""
    forced = os.environ.get("FUSEWRIGHT_CACHE_DIR")
    if forced:
        candidates = [Path(forced)]
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        candidates = [Path(base) / "fusewright", Path(tempfile.gettempdir()) / f"fusewright-{os.getuid()}"]
    for candidate in candidates:
        if _is_writable(candidate):
            if candidate is not candidates[0]:
                warnings.warn(f"{candidates[0]} cannot be written, compiled libraries go to {candidate}", stacklevel=2)
            return candidate
    raise BuildError(f"no folder for compiled libraries can be written: {', '.join(map(str, candidates))}")


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def fingerprint(recipe: Recipe) -> str:
    """Hash of everything that decides the library's bits."""
    digest = hashlib.sha256()
    root = toolchain.source_root()
    for folder in recipe.source_folders:
        for source in sorted(path for path in (root / folder).rglob("*") if path.is_file()):
            digest.update(str(source.relative_to(root)).encode())
            digest.update(source.read_bytes())
    # Commands name this installation's folders; the bits do not depend on where it lies.
    commands = [recipe.compiler_identity, shlex.join(recipe.link)]
    commands += [f"{step.object_name} {shlex.join(step.command)}" for step in recipe.compilations]
    digest.update(re.sub(r"/\S*/", "", "\n".join(commands)).encode())
    for dependency in recipe.depends_on:
        digest.update(fingerprint(_recipe(dependency)).encode())
    return digest.hexdigest()[:16]


def _recipe(name: str) -> Recipe:
    try:
        return toolchain.LIBRARIES[name]()
    except ToolchainError as error:
        raise BuildError(str(error)) from error


@functools.cache
def path_of(name: str) -> Path:
    """The compiled library ``name``, built if it is not there yet.

    Raises:
        BuildError: it cannot be built.
    """
    prebuilt = _prebuilt(name)
    if prebuilt is not None:
        return prebuilt
    recipe = _recipe(name)
    target = directory() / f"{name}-{fingerprint(recipe)}" / recipe.filename
    if not target.exists():
        dependencies = [path_of(dependency) for dependency in recipe.depends_on]
        _build(recipe, target, dependencies)
    return target


def _prebuilt(name: str) -> Path | None:
    """The library that a release wheel brought, if this is one."""
    folder = Path(__file__).resolve().parent / "prebuilt"
    manifest = folder / "manifest.json"
    if not manifest.exists():
        return None
    filename = json.loads(manifest.read_text()).get(name)
    return folder / filename if filename else None


def _build(recipe: Recipe, target: Path, dependencies: list[Path]) -> None:
    from filelock import FileLock

    configuration = hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]
    build_folder = directory() / "build" / f"{recipe.name}-{configuration}"
    build_folder.mkdir(parents=True, exist_ok=True)
    with FileLock(build_folder / "lock"):
        if target.exists():  # another process built it while this one waited
            return
        print(f"fusewright: compiling {recipe.filename} (once, into {target.parent})", file=sys.stderr, flush=True)
        (build_folder / "build.ninja").write_text(_ninja_file(recipe, dependencies))
        _run_ninja(recipe, build_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(build_folder / recipe.filename, target)


def _ninja_file(recipe: Recipe, dependencies: list[Path]) -> str:
    def escape(text: object) -> str:
        return re.sub(r"([$ :])", r"$\1", str(text))

    lines = ["ninja_required_version = 1.5", ""]
    for index, step in enumerate(recipe.compilations):
        command = " ".join(shlex.quote(part).replace("$", "$$") for part in step.command)
        lines += [
            f"rule compile{index}",
            f"  command = {command} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            f"build {step.object_name}: compile{index} {escape(step.source)}",
            "",
        ]
    objects = " ".join(step.object_name for step in recipe.compilations)
    # Objects come first: a linker takes from a library only what is already wanted.
    compiler, *flags = (shlex.quote(part).replace("$", "$$") for part in recipe.link)
    libraries = " ".join(shlex.quote(str(path)) for path in dependencies)
    lines += [
        "rule link",
        f"  command = {compiler} $in {' '.join(flags)} {libraries} -o $out",
        f"build {recipe.filename}: link {objects}",
        "",
    ]
    return "\n".join(lines)


def _run_ninja(recipe: Recipe, build_folder: Path) -> None:
    try:
        import ninja
    except ImportError as error:
        raise BuildError(f"{recipe.filename} needs ninja to be built: pip install ninja") from error
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build_folder)]
    log = build_folder / "build.log"
    with log.open("w") as output:
        result = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
    if result.returncode != 0:
        raise BuildError(_failure_message(recipe, log))


_HINTS = (
    (r"unrecognized command.line option|bad value .* for .-march|unknown target CPU", "g++ 12 or newer is needed"),
    (r"No such file or directory", "a header is missing: is the compiler's C++ library installed?"),
    (r"[Nn]o space left on device", "the disk is full: FUSEWRIGHT_CACHE_DIR can name another folder"),
    (r"Killed|out of memory", "the compiler ran out of memory"),
)


def _failure_message(recipe: Recipe, log: Path) -> str:
    text = log.read_text(errors="replace")
    diagnostic = re.search(r"^.*(?:error|Error|ERROR|fatal)\b.*$", text, re.MULTILINE)
    failed = re.search(r"^FAILED: .*\n(.*)$", text, re.MULTILINE)
    hint = next((hint for pattern, hint in _HINTS if re.search(pattern, text)), "the log holds the rest")
    return (
        f"compiling {recipe.filename} failed: {diagnostic.group(0).strip() if diagnostic else 'no diagnostic found'}\n"
        f"  command: {failed.group(1).strip() if failed else 'see the log'}\n  log: {log}\n  hint: {hint}"
    )
