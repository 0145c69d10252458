"""A bounded mapping for what the host computes once and looks up at every later call."""

import threading
from collections.abc import Hashable
from typing import Any


class Cache:
    """A mapping of at most `2 * size` entries, which drops the least recently used.

    An entry is new until it is looked up, and kept from then on. New entries make room for new ones, the oldest first, and kept entries
    for kept ones: so a stream of keys that never come again, such as the lengths of prompts, drops nothing that comes again and again.

    The kept entries are two generations of `size // 2`. A lookup moves an entry to the younger one; when that is full the older one is
    dropped. So the `size // 2` entries used last are always kept, and a lookup in the younger one costs no more than that of a dict.
    """

    def __init__(self, size: int):
        self.size = size
        self.new, self.young, self.old = {}, {}, {}
        self.lock = threading.Lock()  # of the moves: plain lookups need none

    def __len__(self) -> int:
        return len(self.new) + len(self.young) + len(self.old)

    def get(self, key: Hashable) -> Any | None:
        value = self.young.get(key)
        return self.keep(key) if value is None else value

    def keep(self, key: Hashable) -> Any | None:
        with self.lock:
            value = self.old.pop(key, None)
            if value is None:
                value = self.new.pop(key, None)
            if value is None:
                return self.young.get(key)  # another thread may have moved it
            self.young[key] = value
            if len(self.young) >= self.size // 2:
                self.old, self.young = self.young, {}
        return value

    def __setitem__(self, key: Hashable, value: Any) -> None:
        with self.lock:
            for kept in (self.young, self.old):
                if key in kept:
                    kept[key] = value
                    return
            if len(self.new) >= self.size and key not in self.new:
                del self.new[next(iter(self.new))]
            self.new[key] = value
