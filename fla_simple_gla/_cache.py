"""A bounded mapping, for what the host computes once and looks up at every later call."""

import threading
from collections.abc import Hashable
from typing import Any


class Cache:
    """A mapping of at most `2 * size` entries, which drops those that were used least recently.

    An entry is new until its first lookup, and kept from then on. New entries only take the places of new ones, and
    kept entries those of kept ones. So a stream of keys that never come again, such as the lengths of prompts, drops no
    entry that is looked up again and again.

    The kept entries are two generations of at most `size // 2`. A lookup moves an entry to the younger generation. When
    that is full it becomes the older one, whose entries are dropped. So the `size // 2` entries used last are always
    kept, and a lookup in the younger generation costs no more than a lookup in a dict.
    """

    def __init__(self, size: int):
        self.size = size
        self.new: dict[Hashable, Any] = {}
        self.young: dict[Hashable, Any] = {}
        self.old: dict[Hashable, Any] = {}
        self.lock = threading.Lock()  # for moves between the three: a lookup in `young` needs none

    def __len__(self) -> int:
        return len(self.new) + len(self.young) + len(self.old)

    def get(self, key: Hashable) -> Any:
        """The value of a key; None where there is none."""
        value = self.young.get(key)
        return self.keep(key) if value is None else value

    def keep(self, key: Hashable) -> Any:
        """The value of a key that is not in `young`, to which it moves; None where there is none."""
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
            self.put(key, value)

    def setdefault(self, key: Hashable, value: Any) -> None:
        """Set the value of a key that has none."""
        with self.lock:
            if not any(key in kept for kept in (self.young, self.old, self.new)):
                self.put(key, value)

    def put(self, key: Hashable, value: Any) -> None:
        """Set the value of a key, by a thread that holds the lock."""
        for kept in (self.young, self.old):
            if key in kept:
                kept[key] = value
                return
        if len(self.new) >= self.size and key not in self.new:
            del self.new[next(iter(self.new))]  # the oldest
        self.new[key] = value
