//! The changes of one key: its generations of revisions, sharing structure between versions.
