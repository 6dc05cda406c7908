"""Files that appear whole or not at all, and the hashes that say whether their inputs changed."""

from foldgpt.artifacts.hashes import hash_of, hash_of_file, is_whole
from foldgpt.artifacts.json_files import read_json, with_infinity, without_infinity, write_json
from foldgpt.artifacts.leftovers import put_back, remove, remove_all_leftovers, remove_leftovers
from foldgpt.artifacts.places import check_free, check_free_file, check_free_folder, check_writable_folder, from_home
from foldgpt.artifacts.staging import (
    alone,
    no_empty_folders_above,
    staged_file,
    staged_folder,
    take_over,
    workspace_beside,
    write_bytes,
    write_text,
)

__all__ = [
    "alone",
    "check_free",
    "check_free_file",
    "check_free_folder",
    "check_writable_folder",
    "from_home",
    "hash_of",
    "hash_of_file",
    "is_whole",
    "no_empty_folders_above",
    "put_back",
    "read_json",
    "remove",
    "remove_all_leftovers",
    "remove_leftovers",
    "staged_file",
    "staged_folder",
    "take_over",
    "with_infinity",
    "without_infinity",
    "workspace_beside",
    "write_bytes",
    "write_json",
    "write_text",
]
