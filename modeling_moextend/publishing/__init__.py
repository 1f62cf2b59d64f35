"""Publishing an adapter: its card, the files that make it, and one commit of exactly these."""

from .card import create_card
from .facts import folder_card
from .hub import publish_folder

__all__ = ["create_card", "folder_card", "publish_folder"]
