"""The names of the files in the folders of adapters, base models, experts, soups and question pools."""

from __future__ import annotations

# PEFT's names, in an adapter folder
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_WEIGHTS_FILE = "adapter_model.bin"

# transformers' names, in a model folder
MODEL_CONFIG_FILE = "config.json"
MODEL_WEIGHTS_FILE = "model.safetensors"
MODEL_INDEX_FILE = "model.safetensors.index.json"
INDEX_SUFFIX = ".index.json"

# records of this package, next to the tensors
EXPERT_FILE = "expert.json"
SOUP_FILE = "soup.json"
TINY_BASE_FILE = "base.json"

# the files of a question pool; the first is its record
POOL_FILE = "pool.json"
QUESTIONS_FILE = "questions.jsonl"
FEATURES_FILE = "features.safetensors"

# the files of a learned basis; the first is its record
BASIS_FILE = "basis.json"
BASIS_WEIGHTS_FILE = "basis.safetensors"

# the files of a classifier of texts; the first is its record
CLASSIFIER_FILE = "classifier.json"
CLASSIFIER_WEIGHTS_FILE = "classifier.safetensors"
