r"""Keep, install and revert what was learnt for an environment.

    jaxtta bundle create state.safetensors BUNDLES    # of the state that jaxtta serve saved
    jaxtta bundle install BUNDLES/1f3a… STORE         # verified, then STORE/current
    jaxtta bundle revert STORE                        # what was current before is so again
    jaxtta bundle list STORE
    jaxtta bundle verify STORE                        # all of a store, or one bundle

A bundle is a folder named by its manifest's digest: the state, noise map, generator and source
statistics, settings, class names and the model's fingerprint. It is never changed; a store's
aliases `current` and `previous` are moved at once, and only to a bundle that is whole.

Exit codes: 0; 1 for an error, and if a bundle that is verified is not whole.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from jaxtta.cli.options import group
from jaxtta.deploy import bundle
from jaxtta.deploy.manifest import MANIFEST, aliases_of
from jaxtta.deploy.setup import fingerprint_of, state_of
from jaxtta.images import printable


def _place(name: str) -> object:
    """A positional argument."""
    return tyro.conf.arg(metavar=name)


Store = Annotated[Path, tyro.conf.Positional, _place("STORE")]


@group
class Create:
    """Make a bundle of a saved state."""

    state: Annotated[Path, tyro.conf.Positional, _place("STATE")]  # that jaxtta serve saved
    folder: Annotated[Path, tyro.conf.Positional, _place("FOLDER")]  # where its own folder is made
    model: str | None = None  # where the model is now, if its folder has moved

    def run(self) -> None:
        """Print the new folder."""
        setup, session = state_of(self.state, self.model)
        print(printable(bundle.save_bundle(self.folder, session, setup)))


@group
class Install:
    """Verify a bundle and make it a store's current one."""

    bundle: Annotated[Path, tyro.conf.Positional, _place("BUNDLE")]
    store: Store
    model: str | None = None  # that it is to run with (default: that of the current one)

    def run(self) -> None:
        """Print what is current now."""
        fingerprint = None
        if self.model:
            loaded = bundle.setup_of(self.bundle, self.model).load()
            fingerprint = fingerprint_of(*loaded)
            bundle.load_bundle(self.bundle, *loaded)
        print(f"current: {bundle.install(self.bundle, self.store, fingerprint)}")


@group
class Revert:
    """Make a store's previous bundle the current one."""

    store: Store

    def run(self) -> None:
        """Print what is current now."""
        print(f"current: {bundle.revert(self.store)}")


@group
class List:
    """List a store's bundles."""

    store: Store

    def run(self) -> None:
        """Print a line for each: date, adapter, model, digest, aliases."""
        aliases = aliases_of(self.store)
        for path in bundle.bundles_in(self.store):
            named = [name for name, digest in aliases.items() if digest == path.name]
            try:
                manifest = bundle.verify(path)
            except (ValueError, OSError) as error:
                words = ["damaged", printable(error)]
            else:
                setup, weights = manifest["setup"], manifest["model"]["weights"]
                model = Path(setup["model"]).name
                words = [manifest["created"], setup["adapter"], f"{model} ({weights})", path.name]
            print(*map(printable, words), *named, sep="  ")


@group
class Verify:
    """Check a bundle, or all of a store."""

    path: Annotated[Path, tyro.conf.Positional, _place("PATH")]  # of a bundle or store
    model: str | None = None  # also that it is of this model

    def run(self) -> int:
        """Print what is found; return the exit code."""
        given = self.path
        one = (given / MANIFEST).exists() or given.name in ("current", "previous")
        paths, code = [given] if one else bundle.bundles_in(given), 0
        if not paths:
            raise ValueError(f"{given}: holds no bundle")
        for path in paths:
            try:
                bundle.verify(path)
                if self.model:
                    bundle.load_bundle(path, *bundle.setup_of(path, self.model).load())
                print(f"{printable(path)}: ok")
            except ValueError as error:
                print(printable(error))
                code = 1
        return code


def _command(name: str) -> object:
    return tyro.conf.subcommand(name=name, prefix_name=False)


@dataclasses.dataclass(frozen=True)
class Options:
    """Keep, install and revert what was learnt for an environment."""

    do: Annotated[
        Annotated[Create, _command("create")]
        | Annotated[Install, _command("install")]
        | Annotated[List, _command("list")]
        | Annotated[Revert, _command("revert")]
        | Annotated[Verify, _command("verify")],
        tyro.conf.arg(name=""),
    ]


def run(options: Options) -> int | None:
    """Do it; return the exit code."""
    return options.do.run()
