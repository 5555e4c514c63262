"""`distattn serve`: transformers' own server, which then finds the classes of this package."""

from typing import Annotated

import typer

from .shared import start

command = typer.Typer()


class _Names:
    """transformers' names and the package's classes, where the server looks a checkpoint's class up by its name."""

    def __getattr__(self, name: str):
        import transformers

        import distattn_hf

        return getattr(transformers, name) if hasattr(transformers, name) else getattr(distattn_hf, name)


@command.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example:  distattn serve out/smollm2-l2 --port 8000 --continuous-batching",
)
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A folder or a Hub name; chats need a tokenizer with a chat template.")],
):
    """Serve a model over HTTP as `transformers serve` does, whose options it takes (transformers serve --help)."""
    start()
    from transformers import AutoConfig
    from transformers.utils.import_utils import is_serve_available

    from ..core.paged_batches import refuse_paged

    if not is_serve_available():
        raise ValueError("distattn serve needs a web server: pip install 'distattn_hf[serve]' or transformers[serving]")
    if "--continuous-batching" in context.args:
        refuse_paged(AutoConfig.from_pretrained(model, trust_remote_code="--trust-remote-code" in context.args))
    from transformers.cli.serving import model_manager
    from transformers.cli.transformers import app

    model_manager.transformers = _Names()
    app(["serve", model, *context.args], prog_name="distattn")
