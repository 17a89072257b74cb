//! Where settings come from: the command line, the environment, or a file alone. Decides what wins and how a bad
//! start ends; what values mean is decided in `flags` and `validate`.

use super::syntax::{CommandLine, Given, Next};
use super::{Config, file, flags, help, validate};
use std::collections::BTreeSet;
use std::io;

/// What to do next.
#[derive(Clone, Debug)]
pub enum Loaded {
    /// Start the server; first log the notices, in order.
    Run(Box<Config>, Vec<Notice>),
    /// Print and leave.
    Print { stdout: String, stderr: String, code: i32 },
}

/// The process ends before it has begun: log the notices, print the text, leave with the code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    pub notices: Vec<Notice>,
    pub stderr: String,
    pub code: i32,
}

/// A line for the log, written once there is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    pub level: Level,
    pub message: String,
    pub fields: Vec<(&'static str, String)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Debug,
    Info,
    Warn,
    Error,
    Panic,
    Fatal,
}

impl Level {
    pub const ALL: [Level; 6] = [Level::Debug, Level::Info, Level::Warn, Level::Error, Level::Panic, Level::Fatal];

    pub fn name(self) -> &'static str {
        match self {
            Level::Debug => "debug",
            Level::Info => "info",
            Level::Warn => "warn",
            Level::Error => "error",
            Level::Panic => "panic",
            Level::Fatal => "fatal",
        }
    }

    pub fn parse(text: &str) -> Option<Level> {
        Level::ALL.into_iter().find(|level| level.name() == text)
    }
}

impl Notice {
    pub fn new(level: Level, message: impl Into<String>) -> Self {
        Notice { level, message: message.into(), fields: Vec::new() }
    }

    pub fn info(message: impl Into<String>) -> Self {
        Notice::new(Level::Info, message)
    }

    pub fn warn(message: impl Into<String>) -> Self {
        Notice::new(Level::Warn, message)
    }

    pub fn fatal(message: impl Into<String>) -> Self {
        Notice::new(Level::Fatal, message)
    }

    pub fn with(mut self, key: &'static str, value: impl Into<String>) -> Self {
        self.fields.push((key, value.into()));
        self
    }
}

/// Where the settings of a run came from; some rules differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    FlagsAndVariables,
    File,
}

/// Settings on their way in.
pub(super) struct Draft {
    pub config: Config,
    pub source: Source,
    /// Names of flags that got a value from any source.
    pub set: BTreeSet<&'static str>,
    pub notices: Vec<Notice>,
}

impl Draft {
    pub fn is_set(&self, name: &str) -> bool {
        self.set.contains(name)
    }

    fn exit(mut self, last: Notice) -> Exit {
        self.notices.push(last);
        Exit { notices: self.notices, stderr: String::new(), code: 1 }
    }

    fn refuse(self, error: impl Into<String>) -> Exit {
        self.exit(Notice::warn("failed to verify flags").with("error", error))
    }
}

/// Settings from the words after the program's name, all variables of the environment and, if one is named, a file.
pub fn load(
    args: impl IntoIterator<Item = String>,
    env: impl IntoIterator<Item = (String, String)>,
    read_file: impl FnOnce(&str) -> io::Result<String>,
) -> Result<Loaded, Exit> {
    let config = Config::default();
    let mut draft = Draft { config, source: Source::FlagsAndVariables, set: BTreeSet::new(), notices: Vec::new() };
    match take_flags(&mut draft, args.into_iter()) {
        Ok(rest) => {
            if let Some(word) = rest.first() {
                let error = format!("{word:?} is not a valid flag");
                return Err(draft.refuse(error));
            }
        }
        Err(Stop::Help) => {
            return Ok(Loaded::Print { stdout: help::all_flags(), stderr: help::usage(), code: 0 });
        }
        Err(Stop::Bad(message)) => {
            return Err(Exit { notices: Vec::new(), stderr: format!("{message}\n{}", help::usage()), code: 2 });
        }
    }
    if draft.config.print_version {
        return Ok(Loaded::Print { stdout: help::version(), stderr: String::new(), code: 0 });
    }
    let env: Vec<(String, String)> = env.into_iter().filter(|(key, _)| key.starts_with("ETCD_")).collect();
    let mut draft = match config_file(&draft, &env) {
        Some(path) => take_file(draft, &path, read_file)?,
        None => take_variables(draft, env)?,
    };
    validate::settle(&mut draft);
    if let Err(error) = validate::check(&draft) {
        return Err(draft.refuse(error));
    }
    validate::remark(&mut draft);
    if let Err(error) = validate::check_start(&draft.config) {
        return Err(draft.exit(Notice::fatal("failed to start etcd").with("error", error)));
    }
    Ok(Loaded::Run(Box::new(draft.config), draft.notices))
}

enum Stop {
    Help,
    Bad(String),
}

/// Takes all flags; returns the words that are none.
fn take_flags(draft: &mut Draft, args: impl Iterator<Item = String>) -> Result<Vec<String>, Stop> {
    let mut line = CommandLine::new(args, |name| flags::find(name).map(flags::Flag::arity));
    loop {
        let Given { name, value } = match line.next_flag() {
            Next::Flag(given) => given,
            Next::Help => return Err(Stop::Help),
            Next::Bad(message) => return Err(Stop::Bad(message)),
            Next::Rest(words) => return Ok(words),
        };
        let flag = flags::find(&name).expect("the command line asked for its arity");
        let text = value.as_deref().unwrap_or("true");
        flag.kind.set(&mut draft.config, text).map_err(|reason| {
            Stop::Bad(match flag.kind {
                flags::Kind::Bool(_) => format!("invalid boolean value {text:?} for -{name}: {reason}"),
                _ => format!("invalid value {text:?} for flag -{name}: {reason}"),
            })
        })?;
        note_set(draft, flag);
    }
}

fn note_set(draft: &mut Draft, flag: &'static flags::Flag) {
    draft.set.insert(flag.name);
    if matches!(flag.kind, flags::Kind::Ignored) {
        draft.notices.push(Notice::warn("flag is no longer supported, ignoring it").with("flag", flag.name));
    }
}

/// The file that replaces flags and variables, if any.
fn config_file(draft: &Draft, env: &[(String, String)]) -> Option<String> {
    let flag = Some(&draft.config.config_file).filter(|path| !path.is_empty());
    let variable = || env.iter().find(|(key, value)| key == "ETCD_CONFIG_FILE" && !value.is_empty());
    flag.cloned().or_else(|| variable().map(|(_, path)| path.clone()))
}

fn take_file(flags: Draft, path: &str, read_file: impl FnOnce(&str) -> io::Result<String>) -> Result<Draft, Exit> {
    let mut config = Config::default();
    config.config_file = path.to_owned();
    // No key exists for these two: what the command line says holds beside a file.
    config.raft_read_timeout = flags.config.raft_read_timeout;
    config.raft_write_timeout = flags.config.raft_write_timeout;
    let mut draft = Draft { config, source: Source::File, set: BTreeSet::new(), notices: flags.notices };
    let text = match read_file(path) {
        Ok(text) => text,
        Err(error) => return Err(draft.refuse(format!("open {path}: {}", io_reason(&error)))),
    };
    match file::apply(&text, &mut draft.config) {
        Ok(set) => draft.set = set,
        Err(file::Error::Shape(error)) => return Err(draft.refuse(error)),
        Err(file::Error::Url(error)) => {
            return Err(Exit { notices: draft.notices, stderr: format!("{error}\n"), code: 1 });
        }
    }
    draft
        .notices
        .push(Notice::info("settings are taken from a file, other flags and variables are ignored").with("path", path));
    Ok(draft)
}

/// The system's reason in the form Go gives it.
fn io_reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "no such file or directory".to_owned(),
        io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
        io::ErrorKind::IsADirectory => "is a directory".to_owned(),
        _ => error.to_string(),
    }
}

/// Values from the environment for flags that were not given. Whatever is wrong with values is told last, after the
/// remarks about names.
fn take_variables(mut draft: Draft, env: Vec<(String, String)>) -> Result<Draft, Exit> {
    let given = draft.set.clone();
    let mut used = BTreeSet::new();
    let mut bad_value = None;
    let (special, env): (Vec<_>, Vec<_>) = env.into_iter().partition(|(key, _)| key == "ETCD_VERSION");
    for (key, value) in special {
        draft
            .notices
            .push(Notice::warn("cannot set special environment variable").with("key", key).with("value", value));
    }
    let mut by_name: Vec<&'static flags::Flag> = flags::all().collect();
    by_name.sort_by_key(|flag| flag.name);
    for flag in by_name.into_iter().filter(|flag| !given.contains(flag.name)) {
        let key = flag.env();
        let Some((_, value)) = env.iter().find(|(name, value)| *name == key && !value.is_empty()) else { continue };
        draft.notices.push(
            Notice::info("recognized and used environment variable")
                .with("variable-name", key.clone())
                .with("variable-value", value.clone()),
        );
        match flag.kind.set(&mut draft.config, value) {
            Ok(()) => note_set(&mut draft, flag),
            Err(reason) => bad_value = Some(format!("invalid value {value:?} for {key}: {reason}")),
        }
        used.insert(key);
    }
    let shadowed: BTreeSet<String> = given.iter().filter_map(|name| flags::find(name)).map(flags::Flag::env).collect();
    for (key, value) in &env {
        if shadowed.contains(key) {
            let message = "conflicting environment variable is shadowed by corresponding command-line flag \
                           (either unset environment variable or disable flag))";
            return Err(draft.exit(Notice::fatal(message).with("environment-variable", key.clone())));
        }
        if !used.contains(key) {
            draft.notices.push(
                Notice::warn("unrecognized environment variable")
                    .with("environment-variable", format!("{key}={value}")),
            );
        }
    }
    match bad_value {
        Some(error) => Err(draft.refuse(error)),
        None => Ok(draft),
    }
}
