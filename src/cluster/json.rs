//! JSON whose bytes equal those of the other members' encoder.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Compact, with `<`, `>`, `&` and the two Unicode line separators escaped inside strings.
pub(super) fn to_vec(value: &impl Serialize) -> Vec<u8> {
    let plain = serde_json::to_string(value).expect("names, numbers and lists always encode");
    let mut out = String::with_capacity(plain.len());
    // None of these characters occurs outside a string.
    for c in plain.chars() {
        match c {
            '<' => out.push_str("\\u003c"),
            '>' => out.push_str("\\u003e"),
            '&' => out.push_str("\\u0026"),
            '\u{2028}' => out.push_str("\\u2028"),
            '\u{2029}' => out.push_str("\\u2029"),
            c => out.push(c),
        }
    }
    out.into_bytes()
}

/// An empty list as `null`.
pub(super) fn null_if_empty<S: Serializer>(list: &[String], serializer: S) -> Result<S::Ok, S::Error> {
    if list.is_empty() { serializer.serialize_none() } else { list.serialize(serializer) }
}

/// `null` as the empty value.
pub(super) fn empty_if_null<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}
