"""``lltk serve``."""

from __future__ import annotations

from pathlib import Path

import click

from lltk.cli.options import device_option, download_option, provider_option


@click.command("serve")
@click.argument("recipe", default="tiny_stream")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key.")
@download_option
@device_option
@provider_option
def command(
    recipe: str,
    host: str,
    port: int,
    overrides: tuple[str, ...],
    download: bool,
    device: str | None,
    provider: str | None,
) -> None:
    """Serve live streams of a RECIPE with a stream section, or of a bundle.

    \b
    Example:
      lltk serve tiny_stream
    """
    import uvicorn

    from lltk.cli.inputs import find_source
    from lltk.cli.outputs import share_cores
    from lltk.parallel.devices import find_device
    from lltk.serve.app import create_app
    from lltk.serve.service import Service
    from lltk.serve.settings import Limits

    changes = ("stream.text.after=keep", *overrides)
    source = find_source(recipe, changes, download, True, provider, device)
    plan = source.plan(find_device(device), weights=True)
    share_cores(plan.device)
    service = Service(plan, source.path.stem, Limits(), Path("lltk-serve"))
    app = create_app(service, (), ("127.0.0.1", "localhost"))
    uvicorn.run(app, host=host, port=port, ws_max_size=1 << 16)
