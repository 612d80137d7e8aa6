"""``lltk serve``."""

from __future__ import annotations

import logging
import secrets
from contextlib import ExitStack
from pathlib import Path

import click
from rich.console import Console

from lltk.cli.options import FiniteRange, device_option, download_option, provider_option
from lltk.cli.plans import show_description, show_dry_run

_File = click.Path(path_type=Path)


@click.command("serve")
@click.argument("recipe", default="tiny_stream")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True,
    help="Port to listen at; 0 for any that is free.",
)  # fmt: skip
@click.option(
    "--token", "tokens", multiple=True, help="A secret that clients must send; repeatable."
)
@click.option("--token-file", type=_File, help="File of such secrets, one a line.")
@click.option(
    "--public-host", "names", multiple=True, metavar="NAME",
    help="A name under which clients reach the server, as behind a reverse proxy; repeatable.",
)  # fmt: skip
@click.option(
    "--sessions", type=click.IntRange(1, 1000), default=4, show_default=True,
    help="Live sessions at once, if the device has time for them.",
)  # fmt: skip
@click.option(
    "--per-token",
    type=click.IntRange(1),
    help="Sessions of one token, waiting ones included (default: all).",
)
@click.option(
    "--queue", type=click.IntRange(0), default=8, show_default=True,
    help="Sessions that may wait for room.",
)  # fmt: skip
@click.option(
    "--limit", type=FiniteRange(1), default=600.0, show_default=True,
    help="Seconds of video that a session, or a job, may have.",
)  # fmt: skip
@click.option(
    "--folder", type=_File, default=Path("lltk-serve"), show_default=True,
    help="Where sessions and videos are kept; the next start goes on with them.",
)  # fmt: skip
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key.")
@download_option
@device_option
@provider_option
@click.option("--dry-run", is_flag=True, help="Show the plan and its memory; serve nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON, with --dry-run.")
def command(
    recipe: str,
    host: str,
    port: int,
    tokens: tuple[str, ...],
    token_file: Path | None,
    names: tuple[str, ...],
    sessions: int,
    per_token: int | None,
    queue: int,
    limit: float,
    folder: Path,
    overrides: tuple[str, ...],
    download: bool,
    device: str | None,
    provider: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Serve live streams and video jobs of a RECIPE with a stream section, or of a bundle.

    A page at the address that is printed shows a stream while it is made, and steers it. Programs
    use WS /v1/realtime/video and /v1/videos. Ctrl-C, or a kill, keeps every session; the next start
    goes on with it bit for bit.

    \b
    Example:
      lltk serve tiny_stream
      lltk serve wan22_5b_stream_fp8 --host 0.0.0.0 --token-file tokens.txt --sessions 2
      torchrun --nproc-per-node 2 -m lltk serve wan22_5b_stream_sp2
    """
    from lltk.cli.inputs import find_source
    from lltk.cli.logs import logged
    from lltk.cli.outputs import share_cores
    from lltk.cli.stopping import stopping
    from lltk.files.locks import held
    from lltk.parallel.ranks import joined
    from lltk.serve.running import listening, make_server, serve
    from lltk.serve.security import check_tokens, is_loopback, read_tokens
    from lltk.serve.service import Service
    from lltk.serve.settings import Limits
    from lltk.stream.recipe import stream_section
    from lltk.streaming import Orders, check_plan, check_sessions, follow, load_models

    if as_json and not dry_run:
        raise ValueError("--json: is for --dry-run; drop it, or add that")
    known = [*tokens, *(() if token_file is None else read_tokens(token_file))]
    if not known and not is_loopback(host):
        raise ValueError(
            f"--host: {host} is reached by others, who need a token; add --token, such as "
            f"--token {secrets.token_urlsafe(18)}"
        )
    check_tokens(known)
    limits = Limits(
        sessions=sessions, queue=queue, per_token=per_token or sessions + queue, seconds=limit
    )
    changes = ("stream.text.after=keep", *overrides)
    with ExitStack() as stack:
        ranks = stack.enter_context(joined(device))
        console = Console(quiet=as_json or ranks.rank > 0)
        source = find_source(recipe, changes, download, not dry_run, provider, device)
        if stream_section(source.recipe.stream, str(source.path)).text.after == "free":
            raise ValueError(
                "stream.text.after: free would load the encoder for each prompt; write keep or "
                "offload"
            )
        if ranks.rank == 0 and not dry_run:
            listener = stack.enter_context(listening(host, port))
        with console.status("compiling"):
            plan = source.plan(ranks.device, weights=not dry_run)
        show_description(console, plan)
        if dry_run:
            console.print(
                f"It would serve {sessions} sessions of {limit:g} s, and let {queue} wait; of "
                f"these {limits.per_token} of one token. It would encode them as "
                f"{plan.section.serve.codec}, and keep them in {folder}",
                highlight=False,
            )
            facts = {
                "sessions": sessions,
                "queue": queue,
                "per_token": limits.per_token,
                "limit": limit,
                "codec": plan.section.serve.codec,
                "folder": str(folder),
            }
            if show_dry_run(console, plan, False, facts, as_json and ranks.rank == 0):
                raise SystemExit(1)
            return
        share_cores(plan.device)
        check_plan(plan)
        check_sessions(plan, sessions + 1, ranks.rank)  # jobs have one too
        orders = Orders(ranks.size) if ranks.size > 1 else None
        stop = stack.enter_context(stopping())  # ranks all get a signal; rank 0 tells when to end
        if orders is not None and ranks.rank > 0:
            logging.disable(logging.WARNING)  # rank 0 shows them
            follow(load_models(plan, sessions=sessions + 1), orders)
            return
        stack.enter_context(held(folder))
        stack.enter_context(logged(console))
        public = () if known and not names else ("localhost", "127.0.0.1", "::1", *names)
        service = Service(plan, source.path.stem, limits, folder, orders)
        at, own = listener.getsockname()[:2]
        shown = f"[{at}]" if ":" in at else at
        fragment = f"#token={known[0]}" if tokens else ""
        console.print(f"http://{shown}:{own}/{fragment}", highlight=False, soft_wrap=True)
        serve(make_server(service, known, public), service, listener)
        if orders is not None:
            orders.give(None)
        if stop.asked:
            kept = f"Stopped. The next start goes on with the sessions in {folder}."
            console.print(kept, highlight=False, soft_wrap=True)
