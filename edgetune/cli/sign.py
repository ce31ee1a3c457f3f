"""`edgetune sign`: a publisher's signature over a bundle or an adapter."""

from __future__ import annotations

from pathlib import Path

import click

PASSPHRASE = "EDGETUNE_KEY_PASSPHRASE"


@click.command("sign")
@click.argument("folder", type=click.Path(path_type=Path), metavar="BUNDLE|ADAPTER")
@click.option(
    "--key",
    type=click.Path(path_type=Path),
    required=True,
    metavar="KEY.pem",
    help=f"The private key; the environment variable {PASSPHRASE} opens a locked one.",
)
@click.option(
    "--version",
    type=click.IntRange(0, 2**53 - 1),
    metavar="N",
    help="A number that is signed too: devices that follow refuse one that is not above the last.",
)
@click.option("--passphrase", envvar=PASSPHRASE, hidden=True)
def command(folder: Path, key: Path, version: int | None, passphrase: str | None) -> int:
    """Write model.sig into a bundle or an adapter's folder: every file's sha256 under a signature
    by KEY.pem, in the format of OpenSSF model signing (`model_signing verify key` reads it, too).

    A bundle's hashes are compared first: what is signed is as it was exported.
    """
    from edgetune.core.layout import MANIFEST
    from edgetune.runtime.bundle.digests import verify_files
    from edgetune.runtime.bundle.manifest import read_manifest
    from edgetune.runtime.signature.envelope import SIGNATURE
    from edgetune.runtime.signature.folder import sign_folder
    from edgetune.runtime.signature.keys import read_private_key

    private = read_private_key(key, passphrase)
    if (folder / MANIFEST).exists():
        problems = verify_files(folder, read_manifest(folder))
        for problem in problems:
            click.echo(f"edgetune: {folder}/{problem}. Export the bundle again.", err=True)
        if problems:
            return 1
    signed = sign_folder(folder, private, version=version)
    click.echo(f"{folder / SIGNATURE}: {len(signed.files)} files signed")
    return 0
