"""Makes ``fairseq-train --user-dir ea_fairseq --arch ea_... --help`` show the model's options.

fairseq prints its help before it asks the model for its options, so they are never shown.
"""

import argparse
import functools
import sys
from typing import Optional

from fairseq import options
from fairseq.models import ARCH_MODEL_REGISTRY


def show_model_options_in_help() -> None:
    """Adds the options of an ``ea_`` architecture to the parser if help is to be printed."""
    host = options.add_model_args

    @functools.wraps(host)
    def add_model_args(parser: argparse.ArgumentParser) -> Optional[argparse._ArgumentGroup]:
        group = host(parser)
        asked = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        asked.add_argument("--arch", "-a", nargs="?")
        asked.add_argument("--help", "-h", action="store_true")
        args, _ = asked.parse_known_args(sys.argv[1:])
        if args.help and (args.arch or "").startswith("ea_") and args.arch in ARCH_MODEL_REGISTRY:
            model_group = parser.add_argument_group(f"Model-specific configuration: {args.arch}")
            ARCH_MODEL_REGISTRY[args.arch].add_args(model_group)
        return group

    options.add_model_args = add_model_args
