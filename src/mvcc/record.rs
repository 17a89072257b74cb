//! Records as bytes: a stored key-value and a watch event, encoded once and copied into every answer.
//!
//! `RawKeyValue` and `RawEvent` stand in for the messages `mvccpb.KeyValue` and `mvccpb.Event` in the generated code.
//! They hold the encoded form, so an answer with a thousand keys copies a thousand slices and decodes nothing.
//! [`KeyValue`] is the decoded form, for the places that must look inside.

use bytes::{Buf, BufMut, Bytes};
use prost::{
    DecodeError, Message,
    encoding::{self, DecodeContext, WireType, decode_varint, encode_key, encode_varint, skip_field},
};

/// `mvccpb.KeyValue`, decoded. Its encoding is byte for byte the value of a row in the `key` bucket.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct KeyValue {
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    #[prost(int64, tag = "2")]
    pub create_revision: i64,
    #[prost(int64, tag = "3")]
    pub mod_revision: i64,
    #[prost(int64, tag = "4")]
    pub version: i64,
    #[prost(bytes = "bytes", tag = "5")]
    pub value: Bytes,
    #[prost(int64, tag = "6")]
    pub lease: i64,
}

impl KeyValue {
    pub fn to_raw(&self) -> RawKeyValue {
        RawKeyValue(Bytes::from(self.encode_to_vec()))
    }
}

/// Defines a message type that keeps its own encoded bytes.
macro_rules! raw_message {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
        pub struct $name(pub Bytes);

        impl Message for $name {
            fn encode_raw(&self, buf: &mut impl BufMut) {
                buf.put_slice(&self.0);
            }

            fn encoded_len(&self) -> usize {
                self.0.len()
            }

            fn merge_field(
                &mut self,
                tag: u32,
                wire_type: WireType,
                buf: &mut impl Buf,
                ctx: DecodeContext,
            ) -> Result<(), DecodeError> {
                append_field(&mut self.0, tag, wire_type, buf, ctx)
            }

            fn clear(&mut self) {
                self.0 = Bytes::new();
            }
        }
    };
}

/// Decoding side of a raw message, used by clients: keeps each field as it came.
fn append_field(
    raw: &mut Bytes,
    tag: u32,
    wire_type: WireType,
    buf: &mut impl Buf,
    ctx: DecodeContext,
) -> Result<(), DecodeError> {
    let mut out = Vec::from(std::mem::take(raw));
    encode_key(tag, wire_type, &mut out);
    match wire_type {
        WireType::Varint => encode_varint(decode_varint(buf)?, &mut out),
        WireType::LengthDelimited => {
            let mut field = Vec::new();
            encoding::bytes::merge(wire_type, &mut field, buf, ctx)?;
            encode_varint(field.len() as u64, &mut out);
            out.extend_from_slice(&field);
        }
        _ => return skip_field(wire_type, tag, buf, ctx),
    }
    *raw = out.into();
    Ok(())
}

raw_message!(
    /// An encoded `mvccpb.KeyValue`.
    RawKeyValue
);
raw_message!(
    /// An encoded `mvccpb.Event`.
    RawEvent
);

impl RawKeyValue {
    /// The decoded record. Fails only if the stored bytes are damaged.
    pub fn decode_record(&self) -> Result<KeyValue, DecodeError> {
        KeyValue::decode(self.0.clone())
    }
}

/// Field numbers of `mvccpb.Event`: type 1 (0 PUT, 1 DELETE), kv 2, prev_kv 3.
impl RawEvent {
    /// Encodes an event from the encoded records it carries.
    pub fn new(delete: bool, kv: &RawKeyValue, prev_kv: Option<&RawKeyValue>) -> Self {
        use prost::encoding::{message, uint32};
        let mut buf = Vec::with_capacity(kv.0.len() + prev_kv.map_or(0, |p| p.0.len()) + 16);
        if delete {
            uint32::encode(1, &1, &mut buf);
        }
        message::encode(2, kv, &mut buf);
        if let Some(prev) = prev_kv {
            message::encode(3, prev, &mut buf);
        }
        Self(buf.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_forms_encode_as_the_messages_they_stand_for() {
        let kv =
            KeyValue { key: "k".into(), create_revision: 2, mod_revision: 3, version: 2, value: "v".into(), lease: 7 };
        let raw = kv.to_raw();
        assert_eq!(raw.encode_to_vec(), kv.encode_to_vec());
        assert_eq!(raw.decode_record().unwrap(), kv);
        assert_eq!(RawKeyValue::decode(raw.0.clone()).unwrap(), raw);

        let event = RawEvent::new(true, &raw, Some(&raw));
        assert_eq!(&event.0[..2], &[0x08, 1]);
        assert_eq!(event.0[2], 0x12);
        assert_eq!(event.encoded_len(), 2 + 2 * (2 + raw.0.len()));
    }
}
