//! Settings from a YAML (or JSON) file: nested keys, matched without regard to case; unknown ones are ignored.
//! Unlike on the command line, values have types here, and durations are whole nanoseconds.

use super::flags::{self, Flag, Kind};
use super::{Config, GoDuration};
use serde_json::Value;
use std::collections::BTreeSet;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// Not YAML, or a value of the wrong type.
    Shape(String),
    /// A list of URLs that holds something else; told on stderr as it is.
    Url(String),
}

/// Sets everything the text names and returns which flags that were.
pub fn apply(text: &str, config: &mut Config) -> Result<BTreeSet<&'static str>, Error> {
    let options = serde_saphyr::options! {
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::LastWins,
        legacy_octal_numbers: true,
    };
    let document: Value = match text.trim().is_empty() {
        true => Value::Null,
        false => serde_saphyr::from_str_with_options(text, options)
            .map_err(|error| Error::Shape(format!("error converting YAML to JSON: {error}")))?,
    };
    if !matches!(document, Value::Object(_) | Value::Null) {
        return Err(Error::Shape(format!("the file must be a mapping of settings, not {}", describe(&document))));
    }
    let mut set = BTreeSet::new();
    for flag in flags::all().filter(|flag| !flag.key.is_empty()) {
        let value = look_up(&document, flag.key)?;
        if is_unset(flag, value) {
            continue;
        }
        store(flag, config, value)?;
        set.insert(flag.name);
    }
    if config.self_signed_cert_validity_years == 0 {
        config.self_signed_cert_validity_years = 1;
    }
    Ok(set)
}

/// The value at a dotted path; null where the path ends early.
fn look_up<'a>(document: &'a Value, path: &str) -> Result<&'a Value, Error> {
    let mut value = document;
    let mut walked = 0;
    for key in path.split('.') {
        value = match value {
            Value::Null => return Ok(&Value::Null),
            Value::Object(map) => map
                .get(key)
                .or_else(|| map.iter().find(|(name, _)| name.eq_ignore_ascii_case(key)).map(|(_, value)| value))
                .unwrap_or(&Value::Null),
            other => return Err(wrong_type(&path[..walked - 1], "a block of settings", other)),
        };
        walked += key.len() + 1;
    }
    Ok(value)
}

/// Null is no value; nor is the empty text where a list of URLs, of words or a choice belongs.
fn is_unset(flag: &Flag, value: &Value) -> bool {
    let empty_is_unset = matches!(flag.kind, Kind::Urls(_) | Kind::Origins(_) | Kind::Words(_) | Kind::Choice { .. });
    value.is_null() || (empty_is_unset && value.as_str() == Some(""))
}

fn store(flag: &Flag, config: &mut Config, value: &Value) -> Result<(), Error> {
    let wrong = |expected| wrong_type(flag.key, expected, value);
    let text = || value.as_str().ok_or_else(|| wrong("a string"));
    let number = || value.as_number().ok_or_else(|| wrong("a whole number"));
    match flag.kind {
        Kind::Text(slot) | Kind::Choice { slot, .. } => *slot(config) = text()?.to_owned(),
        Kind::Bool(slot) => *slot(config) = value.as_bool().ok_or_else(|| wrong("true or false"))?,
        Kind::Uint(slot) => {
            let whole = as_whole(number()?).and_then(|n| u64::try_from(n).ok());
            *slot(config) = whole.ok_or_else(|| wrong("a whole number, not negative"))?;
        }
        Kind::Uint32(slot) => {
            let whole = as_whole(number()?).and_then(|n| u32::try_from(n).ok());
            *slot(config) = whole.ok_or_else(|| wrong("a whole number from 0 to 4294967295"))?;
        }
        Kind::Int(slot) => {
            let whole = as_whole(number()?).and_then(|n| i64::try_from(n).ok());
            *slot(config) = whole.ok_or_else(|| wrong("a whole number"))?;
        }
        Kind::Duration(slot) => {
            let whole = value.as_number().and_then(as_whole).and_then(|n| i64::try_from(n).ok());
            *slot(config) = GoDuration::from_nanos(whole.ok_or_else(|| wrong("a whole number of nanoseconds"))?);
        }
        Kind::Urls(_) | Kind::Origins(_) => {
            // etcd names the wrong list here, and scripts may look for it.
            let named = if flag.name == "advertise-client-urls" { "advertise-peer-urls" } else { flag.key };
            flag.kind
                .set(config, text()?)
                .map_err(|reason| Error::Url(format!("unexpected error setting up {named}: {reason}")))?;
        }
        Kind::Words(_) | Kind::Gates => flag.kind.set(config, text()?).map_err(Error::Shape)?,
        Kind::List(slot) => {
            let items = value.as_array().ok_or_else(|| wrong("a list of strings"))?;
            let words: Option<Vec<String>> = items.iter().map(|item| item.as_str().map(str::to_owned)).collect();
            *slot(config) = words.ok_or_else(|| wrong("a list of strings"))?;
        }
        Kind::Ignored => {}
    }
    Ok(())
}

/// `1e3` is a whole number too.
fn as_whole(number: &serde_json::Number) -> Option<i128> {
    if let Some(value) = number.as_i128() {
        return Some(value);
    }
    // Beyond 2^63 a float no longer names one whole number.
    number.as_f64().filter(|value| value.fract() == 0.0 && value.abs() < 9.2e18).map(|value| value as i128)
}

fn wrong_type(key: &str, expected: &str, found: &Value) -> Error {
    Error::Shape(format!("setting {key:?} in the file must be {expected}, not {}", describe(found)))
}

fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(value) => format!("the boolean {value}"),
        Value::Number(value) => format!("the number {value}"),
        Value::String(value) => format!("the string {value:?}"),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "a block of settings".to_owned(),
    }
}
