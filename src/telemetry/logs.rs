//! Log lines in the form etcd's users and scripts know: one JSON object a line (or tab-separated columns for reading),
//! fed by `tracing` events. Owns the outputs; knows no metric.
//!
//! A line goes out under a lock, in one write per output, so lines never mix. Of equal messages within a second the
//! first hundred are written, then one in a hundred, so that a fault in a hot path cannot fill the disk with itself.

use crate::config::{Config, GoDuration, Level, Notice};
use serde_json::Value;
use std::collections::HashMap;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("couldn't open sink {path:?}: {source}")]
    Open { path: String, source: io::Error },
    #[error("logging is set up already")]
    Twice,
}

/// Starts logging for the whole process. Keep the guard: it writes the lines that are not `tracing` events.
pub fn init(config: &Config) -> Result<Guard, Error> {
    let logs = Logs::open(config)?;
    let subscriber = tracing_subscriber::registry().with(logs.layer());
    tracing::subscriber::set_global_default(subscriber).map_err(|_| Error::Twice)?;
    Ok(Guard { logs })
}

/// Writes lines for a process that ends before its settings are known: to stderr, as JSON.
pub fn print(notices: &[Notice]) {
    let logs = Logs::new(vec![Output::Stderr], Format::Json, Level::Info);
    for notice in notices {
        logs.notice(notice);
    }
}

/// The running log.
#[derive(Clone, Debug)]
pub struct Guard {
    logs: Logs,
}

impl Guard {
    pub fn notice(&self, notice: &Notice) {
        self.logs.notice(notice);
    }

    /// From now on a panic is a line of the log, with its reason and place. Whether the process goes on is for others
    /// to decide.
    pub fn report_panics(&self) {
        let logs = self.logs.clone();
        let plainly = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !logs.panicked(panic) {
                plainly(panic);
            }
        }));
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Json,
    Console,
}

#[derive(Debug)]
enum Output {
    Stdout,
    Stderr,
    File(File),
    #[cfg(test)]
    Memory(Arc<Mutex<Vec<u8>>>),
}

impl Output {
    fn open(name: &str) -> Result<Output, Error> {
        match name {
            // systemd keeps what a service writes to stderr in its journal.
            "default" | "stderr" | "systemd/journal" => Ok(Output::Stderr),
            "stdout" => Ok(Output::Stdout),
            path => OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .map(Output::File)
                .map_err(|source| Error::Open { path: path.to_owned(), source }),
        }
    }

    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        match self {
            Output::Stdout => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(line)?;
                stdout.flush()
            }
            Output::Stderr => io::stderr().lock().write_all(line),
            Output::File(file) => file.write_all(line),
            #[cfg(test)]
            Output::Memory(buffer) => buffer.lock().expect("no holder of this lock panics").write_all(line),
        }
    }
}

/// The outputs and what passes to them.
#[derive(Clone, Debug)]
struct Logs {
    format: Format,
    level: Level,
    sink: Arc<Mutex<Sink>>,
}

#[derive(Debug)]
struct Sink {
    outputs: Vec<Output>,
    sampler: Sampler,
}

impl Logs {
    fn open(config: &Config) -> Result<Logs, Error> {
        let outputs = config.log_outputs.iter().map(|name| Output::open(name)).collect::<Result<_, _>>()?;
        let format = if config.log_format == "console" { Format::Console } else { Format::Json };
        Ok(Logs::new(outputs, format, Level::parse(&config.log_level).unwrap_or(Level::Info)))
    }

    fn new(outputs: Vec<Output>, format: Format, level: Level) -> Logs {
        Logs { format, level, sink: Arc::new(Mutex::new(Sink { outputs, sampler: Sampler::default() })) }
    }

    fn layer<S: tracing::Subscriber + for<'span> LookupSpan<'span>>(&self) -> impl Layer<S> + use<S> {
        let filter = match self.level {
            Level::Debug => LevelFilter::DEBUG,
            Level::Info => LevelFilter::INFO,
            Level::Warn => LevelFilter::WARN,
            Level::Error => LevelFilter::ERROR,
            // Events know nothing above error.
            Level::Panic | Level::Fatal => LevelFilter::OFF,
        };
        Events(self.clone()).with_filter(filter)
    }

    #[track_caller]
    fn notice(&self, notice: &Notice) {
        if notice.level < self.level {
            return;
        }
        let caller = std::panic::Location::caller();
        let fields = notice.fields.iter().map(|(key, value)| (key.to_string(), Value::from(value.clone()))).collect();
        self.write(&Line {
            level: notice.level,
            logger: None,
            caller: short_caller(caller.file(), caller.line()),
            message: notice.message.clone(),
            fields,
        });
    }

    /// False if it is not to be written, or cannot be.
    fn panicked(&self, panic: &std::panic::PanicHookInfo<'_>) -> bool {
        if Level::Panic < self.level {
            return false;
        }
        let thread = std::thread::current().name().unwrap_or("unnamed").to_owned();
        let mut fields = vec![("thread".to_owned(), Value::from(thread))];
        // Only when the environment asks for it.
        let backtrace = std::backtrace::Backtrace::capture();
        if backtrace.status() == std::backtrace::BacktraceStatus::Captured {
            fields.push(("stacktrace".to_owned(), Value::from(backtrace.to_string())));
        }
        let payload = panic.payload();
        let message = payload.downcast_ref::<&str>().copied().or(payload.downcast_ref::<String>().map(String::as_str));
        let line = Line {
            level: Level::Panic,
            logger: None,
            caller: panic.location().map_or_else(|| "unknown".to_owned(), |at| short_caller(at.file(), at.line())),
            message: message.unwrap_or("panic").to_owned(),
            fields,
        };
        // Not waited for: the panic may have come while this very thread wrote a line.
        match self.sink.try_lock() {
            Ok(mut sink) => self.write_to(&mut sink, &line),
            Err(TryLockError::Poisoned(sink)) => self.write_to(&mut sink.into_inner(), &line),
            Err(TryLockError::WouldBlock) => return false,
        }
        true
    }

    fn write(&self, line: &Line) {
        // A panic while a line was written leaves at worst half a line; logging goes on.
        let mut sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner);
        self.write_to(&mut sink, line);
    }

    fn write_to(&self, sink: &mut Sink, line: &Line) {
        #[allow(clippy::disallowed_methods)] // a log line tells when it was written
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        if !sink.sampler.admit(now.as_secs(), line.level, &line.message) {
            return;
        }
        let text = line.render(self.format, now);
        for output in &mut sink.outputs {
            // There is nowhere left to report that the log cannot be written.
            let _ = output.write(text.as_bytes());
        }
    }
}

/// Counts equal messages of the current second.
#[derive(Debug, Default)]
struct Sampler {
    second: u64,
    seen: HashMap<(u8, String), u64>,
}

impl Sampler {
    const FIRST: u64 = 100;
    const THEREAFTER: u64 = 100;
    /// Messages are mostly fixed texts; if they are not, counting stops before it costs memory.
    const KINDS_MAX: usize = 4096;

    fn admit(&mut self, second: u64, level: Level, message: &str) -> bool {
        if level >= Level::Panic {
            return true;
        }
        if second != self.second {
            self.second = second;
            self.seen.clear();
        }
        if self.seen.len() >= Self::KINDS_MAX {
            return true;
        }
        let count = self.seen.entry((level as u8, message.to_owned())).or_insert(0);
        *count += 1;
        *count <= Self::FIRST || (*count - Self::FIRST).is_multiple_of(Self::THEREAFTER)
    }
}

/// One event, ready to be written.
#[derive(Debug)]
struct Line {
    level: Level,
    logger: Option<String>,
    caller: String,
    message: String,
    fields: Vec<(String, Value)>,
}

impl Line {
    fn render(&self, format: Format, now: Duration) -> String {
        let ts = timestamp(now);
        let level = self.level.name();
        let fields = fields_json(&self.fields);
        match format {
            Format::Json => {
                let mut text = format!(r#"{{"level":"{level}","ts":"{ts}","#);
                if let Some(logger) = &self.logger {
                    text += &format!(r#""logger":{},"#, json(logger));
                }
                text += &format!(r#""caller":{},"msg":{}"#, json(&self.caller), json(&self.message));
                if !fields.is_empty() {
                    text += &format!(",{fields}");
                }
                text += "}\n";
                text
            }
            Format::Console => {
                let columns = [Some(ts.as_str()), Some(level), self.logger.as_deref(), Some(&self.caller)];
                let mut text = columns.into_iter().flatten().collect::<Vec<_>>().join("\t");
                text += &format!("\t{}", self.message.replace('\n', "\\n"));
                if !fields.is_empty() {
                    text += &format!("\t{{{fields}}}");
                }
                text.push('\n');
                text
            }
        }
    }
}

fn json(text: &str) -> String {
    Value::from(text).to_string()
}

/// Fields without the braces, in the order given.
fn fields_json(fields: &[(String, Value)]) -> String {
    fields.iter().map(|(key, value)| format!("{}:{value}", json(key))).collect::<Vec<_>>().join(",")
}

/// `src/raft/node.rs` in line 12 is `raft/node.rs:12`: the last folder is enough to find it.
fn short_caller(file: &str, line: u32) -> String {
    let from = file.rmatch_indices('/').nth(1).map_or(0, |(at, _)| at + 1);
    format!("{}:{line}", &file[from..])
}

struct Events(Logs);

impl<S: tracing::Subscriber> Layer<S> for Events {
    fn on_event(&self, event: &tracing::Event<'_>, _context: Context<'_, S>) {
        let metadata = event.metadata();
        let level = match *metadata.level() {
            tracing::Level::ERROR => Level::Error,
            tracing::Level::WARN => Level::Warn,
            tracing::Level::INFO => Level::Info,
            _ => Level::Debug,
        };
        let mut fields = Fields::default();
        event.record(&mut fields);
        // A target that is no module path was chosen: it is the logger's name.
        let logger = Some(metadata.target()).filter(|target| metadata.module_path() != Some(*target));
        self.0.write(&Line {
            level,
            logger: logger.map(str::to_owned),
            caller: short_caller(metadata.file().unwrap_or("unknown"), metadata.line().unwrap_or(0)),
            message: fields.message,
            fields: fields.others,
        });
    }
}

/// Collects the fields of an event as JSON values. Their names get hyphens for underscores, as etcd writes them.
#[derive(Default)]
struct Fields {
    message: String,
    others: Vec<(String, Value)>,
}

impl Fields {
    fn push(&mut self, field: &Field, value: Value) {
        match (field.name(), value) {
            ("message", Value::String(text)) => self.message = text,
            ("message", other) => self.message = other.to_string(),
            (name, value) => self.others.push((name.replace('_', "-"), value)),
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.push(field, Value::from(format!("{value:?}")));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.push(field, Value::from(value));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.push(field, Value::from(value));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.push(field, Value::from(value));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.push(field, Value::from(value));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.push(field, Value::from(value));
    }

    fn record_i128(&mut self, field: &Field, value: i128) {
        self.push(field, Value::from(value.to_string()));
    }

    fn record_u128(&mut self, field: &Field, value: u128) {
        self.push(field, Value::from(value.to_string()));
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.push(field, Value::from(value.to_string()));
    }
}

/// Lets a line through at most once in [`Seldom::EVERY`], for what may happen a hundred times a second.
#[derive(Debug, Default)]
pub struct Seldom {
    said: Option<Instant>,
    unsaid: u64,
}

impl Seldom {
    const EVERY: Duration = Duration::from_secs(10);

    /// How often it has been held back since the last line, if a line is due.
    pub fn admit(&mut self) -> Option<u64> {
        self.admit_at(Instant::now())
    }

    fn admit_at(&mut self, now: Instant) -> Option<u64> {
        if self.said.is_some_and(|said| now.saturating_duration_since(said) < Self::EVERY) {
            self.unsaid += 1;
            return None;
        }
        self.said = Some(now);
        Some(std::mem::take(&mut self.unsaid))
    }
}

/// A duration as a field value, written as Go writes it: `info!(took = %took(start.elapsed()), "…")`.
pub fn took(duration: Duration) -> GoDuration {
    GoDuration::from(duration)
}

/// `2026-01-02T15:04:05.000000Z` for a time since 1970.
pub fn timestamp(since_epoch: Duration) -> String {
    let seconds = since_epoch.as_secs();
    let (year, month, day) = civil_date(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60);
    let micros = since_epoch.subsec_micros();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
}

/// Year, month and day of a number of days since 1970-01-01.
fn civil_date(mut days: u64) -> (u64, u64, u64) {
    const DAYS_OF_400_YEARS: u64 = 146_097;
    let is_leap = |year: u64| (year.is_multiple_of(4) && !year.is_multiple_of(100)) || year.is_multiple_of(400);
    let mut year = 1970 + days / DAYS_OF_400_YEARS * 400;
    days %= DAYS_OF_400_YEARS;
    loop {
        let length = if is_leap(year) { 366 } else { 365 };
        if days < length {
            break;
        }
        days -= length;
        year += 1;
    }
    let february = if is_leap(year) { 29 } else { 28 };
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capture(format: Format, level: Level, log: impl FnOnce(&Logs)) -> Vec<String> {
        let buffer = Arc::new(Mutex::new(Vec::new()));
        let logs = Logs::new(vec![Output::Memory(buffer.clone())], format, level);
        let subscriber = tracing_subscriber::registry().with(logs.layer());
        tracing::subscriber::with_default(subscriber, || log(&logs));
        let text = String::from_utf8(buffer.lock().unwrap().clone()).expect("UTF-8");
        assert!(text.is_empty() || text.ends_with('\n'));
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn json_lines_have_the_known_keys_in_order() {
        let lines = capture(Format::Json, Level::Info, |_| {
            tracing::info!(target: "raft", local_member_id = "8e9e", term = 7_u64, ok = true, "became \"leader\"");
            tracing::warn!(took = %took(Duration::from_millis(1_500)), "slow");
            tracing::debug!("not shown");
        });
        assert_eq!(lines.len(), 2);
        let line = &lines[0];
        assert!(line.starts_with(r#"{"level":"info","ts":"20"#), "{line}");
        assert!(line.contains(r#"Z","logger":"raft","caller":"telemetry/logs.rs:"#), "{line}");
        assert!(line.ends_with(r#","msg":"became \"leader\"","local-member-id":"8e9e","term":7,"ok":true}"#), "{line}");
        assert!(!lines[1].contains("logger"), "{}", lines[1]);
        assert!(lines[1].ends_with(r#","msg":"slow","took":"1.5s"}"#), "{}", lines[1]);
        for line in lines {
            assert!(serde_json::from_str::<serde_json::Map<_, _>>(&line).is_ok(), "{line}");
        }
    }

    #[test]
    fn console_lines_are_columns() {
        let lines = capture(Format::Console, Level::Debug, |logs| {
            tracing::debug!(n = 1, "two\nlines");
            logs.notice(&Notice::fatal("over").with("error", "x"));
        });
        let columns: Vec<_> = lines[0].split('\t').collect();
        assert_eq!((columns[1], columns[3], columns[4]), ("debug", "two\\nlines", r#"{"n":1}"#));
        let columns: Vec<_> = lines[1].split('\t').collect();
        assert_eq!((columns[1], columns[3], columns[4]), ("fatal", "over", r#"{"error":"x"}"#));
    }

    #[test]
    fn levels_above_error_silence_events_but_not_fatal_notices() {
        let lines = capture(Format::Json, Level::Fatal, |logs| {
            tracing::error!("not shown");
            logs.notice(&Notice::warn("not shown"));
            logs.notice(&Notice::fatal("shown"));
        });
        assert_eq!(lines.len(), 1);
        assert!(lines[0].contains(r#""msg":"shown""#));
    }

    #[test]
    fn a_panic_is_a_line_with_its_reason_and_place() {
        let lines = capture(Format::Json, Level::Info, |logs| {
            Guard { logs: logs.clone() }.report_panics();
            let _ = std::panic::catch_unwind(|| panic!("cannot write the {}: no space left", "store"));
            // The one that tests have.
            drop(std::panic::take_hook());
        });
        // Another test may have panicked meanwhile.
        let line = lines.iter().find(|line| line.contains("cannot write the store: no space left")).expect("a line");
        assert!(line.starts_with(r#"{"level":"panic","ts":"20"#), "{line}");
        assert!(line.contains(r#","caller":"telemetry/logs.rs:"#) && line.contains(r#","thread":""#), "{line}");
        assert!(serde_json::from_str::<serde_json::Map<_, _>>(line).is_ok(), "{line}");
    }

    #[test]
    fn equal_messages_are_thinned_out_within_a_second() {
        let mut sampler = Sampler::default();
        let mut admitted =
            |second, message: &str, times| (0..times).filter(|_| sampler.admit(second, Level::Info, message)).count();
        assert_eq!(admitted(1, "a", 1_000), 109);
        assert_eq!(admitted(1, "b", 50), 50);
        assert_eq!(admitted(2, "a", 100), 100);
        assert!((0..1_000).all(|_| sampler.admit(2, Level::Fatal, "x")));
    }

    #[test]
    fn a_fault_that_goes_on_is_told_every_ten_seconds() {
        let (mut seldom, start) = (Seldom::default(), Instant::now());
        let told: Vec<_> = (0..25).filter_map(|s| seldom.admit_at(start + Duration::from_secs(s))).collect();
        assert_eq!(told, [0, 9, 9]);
    }

    #[test]
    fn timestamps_follow_the_calendar() {
        let cases = [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_782_399, "2000-02-28T23:59:59.000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000Z"),
            (1_767_366_245, "2026-01-02T15:04:05.000000Z"),
            (4_107_542_399, "2100-02-28T23:59:59.000000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000000Z"),
            (253_402_300_799, "9999-12-31T23:59:59.000000Z"),
        ];
        for (seconds, text) in cases {
            assert_eq!(timestamp(Duration::from_secs(seconds)), text);
        }
        assert_eq!(timestamp(Duration::new(1, 234_567_999)), "1970-01-01T00:00:01.234567Z");
    }

    #[test]
    fn outputs_can_be_files_and_append() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("log").to_str().expect("UTF-8").to_owned();
        let config = Config { log_outputs: vec![path.clone()], ..Config::default() };
        for _ in 0..2 {
            Logs::open(&config).expect("opens").notice(&Notice::info("hello"));
        }
        assert_eq!(std::fs::read_to_string(&path).expect("readable").lines().count(), 2);
        let config = Config { log_outputs: vec![format!("{path}/below/a/file")], ..config };
        assert!(Logs::open(&config).is_err());
    }
}
