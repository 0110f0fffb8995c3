"""Words as a condition: `load_text_encoder` makes an encoder from its name, and an encoder makes arrays of sentences."""
from .bert import Bert
from .clip import Clip
from .encoders import TextEncoder, encode_in_batches, load_text_encoder, text_encoders

__all__ = ["Bert", "Clip", "TextEncoder", "encode_in_batches", "load_text_encoder", "text_encoders"]
