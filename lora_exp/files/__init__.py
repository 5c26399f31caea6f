"""Bytes on disk: whole, locked, hashed, without secrets.

paths      the package's files, the cache, folders
revision   what identifies a base's weights
redaction  secrets kept out of every file
lock       one process at a time here
whole      files whole or absent, their hashes
"""
