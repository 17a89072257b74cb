//! raft-rs's own lines in our log, with what they say beside the message: whose they are, from whom a vote came.

use std::fmt::{self, Write};

use slog::{Key, Level, OwnedKVList, Record, Serializer};

/// Sends raft-rs's lines to `tracing`.
pub struct Lines;

impl slog::Drain for Lines {
    type Ok = ();
    type Err = slog::Never;

    fn log(&self, record: &Record<'_>, of_logger: &OwnedKVList) -> Result<(), slog::Never> {
        // The text is made only where somebody listens: the macros look before they evaluate.
        match record.level() {
            Level::Critical | Level::Error => tracing::error!(target: "raft", "{}", text(record, of_logger)),
            Level::Warning => tracing::warn!(target: "raft", "{}", text(record, of_logger)),
            Level::Info => tracing::info!(target: "raft", "{}", text(record, of_logger)),
            _ => {}
        }
        Ok(())
    }
}

fn text(record: &Record<'_>, of_logger: &OwnedKVList) -> String {
    let mut values = Values(record.msg().to_string());
    // A value that cannot be written is left out.
    let _ = slog::KV::serialize(&record.kv(), record, &mut values);
    let _ = slog::KV::serialize(of_logger, record, &mut values);
    values.0
}

struct Values(String);

impl Serializer for Values {
    fn emit_arguments(&mut self, key: Key, value: &fmt::Arguments<'_>) -> slog::Result {
        write!(self.0, "; {key}: {value}").map_err(slog::Error::from)
    }

    fn emit_u64(&mut self, key: Key, value: u64) -> slog::Result {
        // Members are written as everywhere else.
        match AsRef::<str>::as_ref(&key) {
            "raft_id" | "id" | "from" | "to" | "leader_id" => self.emit_arguments(key, &format_args!("{value:x}")),
            _ => self.emit_arguments(key, &format_args!("{value}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    struct Caught(mpsc::Sender<String>);

    impl slog::Drain for Caught {
        type Ok = ();
        type Err = slog::Never;

        fn log(&self, record: &Record<'_>, of_logger: &OwnedKVList) -> Result<(), slog::Never> {
            self.0.send(text(record, of_logger)).expect("it is caught");
            Ok(())
        }
    }

    #[test]
    fn values_stand_behind_the_message() {
        let (sender, lines) = mpsc::channel();
        let logger = slog::Logger::root(Caught(sender), slog::o!("raft_id" => 0xab_u64));
        slog::info!(logger, "became candidate at term {}", 3);
        slog::info!(logger, "received a vote"; "from" => 0xcd_u64, "term" => 17_u64, "type" => ?Some("x"));
        drop(logger);
        let lines: Vec<String> = lines.iter().collect();
        assert_eq!(lines[0], "became candidate at term 3; raft_id: ab");
        for value in ["; from: cd", "; term: 17", "; type: Some(\"x\")", "; raft_id: ab"] {
            assert!(lines[1].contains(value), "{}", lines[1]);
        }
    }
}
