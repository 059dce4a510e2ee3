"""The options of the scripts besides `ASKDConfig`. `parser` parses them from the command line and a YAML file.

Every field is a command-line option and a key of the YAML file given by `--config`. Its help is its documentation.
"""

from .data import NONE, NORMALIZER_HELP, NORMALIZERS, DataArguments, Normalizer, SpeechSource, names_of
from .mixing import CacheArguments, MixArguments
from .models import ModelArguments
from .run import RunArguments
