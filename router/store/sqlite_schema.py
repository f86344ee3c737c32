"""The tables of the SQLite file, as the steps that led to them.

`PRAGMA user_version` is how many steps a file has seen. A step that was ever released is not
changed any more: a new one is added behind it.

`leases` is the heart: one line for each account and process. The process "" is what ended ones
left. Always granted >= spent >= counted, where `counted` is what the process's rows say of the
account. Sums of bytes are kept by triggers, so that no eviction has to count.
"""

from __future__ import annotations

# "Rung": tells our files from other programs'.
APPLICATION_ID = 0x52756E67

_FIRST = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
INSERT INTO meta VALUES ('key_version', 0);

CREATE TABLE processes (process TEXT PRIMARY KEY, heard_at REAL NOT NULL, ended_at REAL)
  WITHOUT ROWID;

CREATE TABLE leases (
  owner TEXT NOT NULL, meter TEXT NOT NULL, window INTEGER NOT NULL, process TEXT NOT NULL,
  granted INTEGER NOT NULL, spent INTEGER NOT NULL, counted INTEGER NOT NULL,
  number INTEGER NOT NULL, forgotten_at INTEGER NOT NULL,
  PRIMARY KEY (owner, meter, window, process)
) WITHOUT ROWID;
CREATE INDEX leases_of_process ON leases (process);
CREATE INDEX leases_to_forget ON leases (forgotten_at) WHERE forgotten_at > 0;

CREATE TABLE usage (
  process TEXT NOT NULL, day INTEGER NOT NULL, key TEXT NOT NULL, session TEXT NOT NULL,
  ladder TEXT NOT NULL, rung TEXT NOT NULL,
  requests INTEGER NOT NULL, input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL,
  settled INTEGER NOT NULL, overrun INTEGER NOT NULL, estimated INTEGER NOT NULL,
  in_doubt INTEGER NOT NULL,
  PRIMARY KEY (process, day, key, session, ladder, rung)
) WITHOUT ROWID;
CREATE INDEX usage_of_key ON usage (key, day);
CREATE INDEX usage_in_doubt ON usage (key) WHERE in_doubt > 0;

CREATE TABLE keys (
  name TEXT PRIMARY KEY, record TEXT NOT NULL, parent TEXT NOT NULL, ends_at REAL NOT NULL,
  version INTEGER NOT NULL
) WITHOUT ROWID;
CREATE UNIQUE INDEX keys_by_version ON keys (version);
CREATE INDEX sessions ON keys (name) WHERE parent <> '';
CREATE INDEX sessions_of_key ON keys (parent) WHERE parent <> '';
CREATE INDEX plain_keys ON keys (name) WHERE parent = '';
CREATE INDEX sessions_by_end ON keys (ends_at) WHERE parent <> '' AND ends_at > 0;
CREATE TABLE digests (digest TEXT PRIMARY KEY, name TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX digests_of_key ON digests (name);

CREATE TABLE sums (name TEXT PRIMARY KEY, bytes INTEGER NOT NULL, entries INTEGER NOT NULL)
  WITHOUT ROWID;

CREATE TABLE answers (
  id INTEGER PRIMARY KEY, key TEXT NOT NULL, name TEXT NOT NULL, fingerprint TEXT NOT NULL,
  process TEXT NOT NULL, claimed_at REAL NOT NULL, body BLOB, status INTEGER NOT NULL DEFAULT 0,
  headers TEXT NOT NULL DEFAULT '{}', size INTEGER NOT NULL DEFAULT 256, ends_at REAL NOT NULL,
  UNIQUE (key, name)
);
CREATE INDEX answers_of_key ON answers (key, id) WHERE body IS NOT NULL;
CREATE INDEX answers_by_end ON answers (ends_at);
CREATE TRIGGER answer_in AFTER INSERT ON answers BEGIN
  INSERT INTO sums VALUES ('answers', new.size, 1), ('answers:' || new.key, new.size, 1)
    ON CONFLICT DO UPDATE SET bytes = bytes + new.size, entries = entries + 1;
END;
CREATE TRIGGER answer_kept AFTER UPDATE OF size ON answers BEGIN
  UPDATE sums SET bytes = bytes + new.size - old.size
    WHERE name IN ('answers', 'answers:' || new.key);
END;
CREATE TRIGGER answer_out AFTER DELETE ON answers BEGIN
  UPDATE sums SET bytes = bytes - old.size, entries = entries - 1
    WHERE name IN ('answers', 'answers:' || old.key);
  DELETE FROM sums WHERE name = 'answers:' || old.key AND entries = 0;
END;

CREATE TABLE cache (
  id INTEGER PRIMARY KEY AUTOINCREMENT, cache_key BLOB NOT NULL UNIQUE, dropped_with TEXT NOT NULL,
  body BLOB NOT NULL, size INTEGER NOT NULL, ends_at REAL NOT NULL
);
CREATE INDEX cache_by_group ON cache (dropped_with);
CREATE INDEX cache_by_end ON cache (ends_at);
CREATE TRIGGER entry_in AFTER INSERT ON cache BEGIN
  INSERT INTO sums VALUES ('cache', new.size, 1)
    ON CONFLICT DO UPDATE SET bytes = bytes + new.size, entries = entries + 1;
END;
CREATE TRIGGER entry_out AFTER DELETE ON cache BEGIN
  UPDATE sums SET bytes = bytes - old.size, entries = entries - 1 WHERE name = 'cache';
END;
"""

STEPS: tuple[str, ...] = (_FIRST,)
# A damaged one of these refuses the file; the others hold nothing that cannot be had again.
CHECKED_TABLES = ("meta", "processes", "leases", "usage", "keys", "digests")
