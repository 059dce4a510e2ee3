"""The options of the scripts besides `ASKDConfig`. `parser` parses them from the command line and a YAML file.

Every field is a command-line option and a key of the YAML file given by `--config`. Its help is its documentation.
"""

from .data import DEFAULT_DATASET, NONE, DataArguments, SpeechSource, names_of, one_each
from .mixing import CacheArguments, MixArguments
from .models import ModelArguments
from .normalizer import NORMALIZER_HELP, NORMALIZERS, Normalizer
