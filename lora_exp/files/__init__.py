"""Files on disk: written completely or not at all, locked, hashed, without secrets.

paths      the package's files, the cache, folders
revision   what identifies a base's weights
redaction  secrets kept out of every file
lock       one process at a time here
strict     JSON without NaN
yaml_text  plain values as YAML
whole      files complete or absent, their hashes
digests    large files' hashes, from the cache
"""
