//! The compiled protocol definitions against the table of etcd's API, `tests/data/api.tsv`, row by row.
//!
//! The descriptors are written out in the columns of the table and the two sets of rows are compared in both
//! directions, so a field that is missing, renumbered, retyped or invented shows up as a line. The table's last column
//! (the release that brought an element) has no counterpart in a descriptor that matters on the wire and is left out.

use std::collections::BTreeSet;

use prost::Message;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet,
    ServiceDescriptorProto,
    field_descriptor_proto::{Label, Type},
};

const TABLE: &str = include_str!("data/api.tsv");
const COLUMNS: usize = 13;

#[test]
fn descriptors_equal_the_api_table() {
    let table: BTreeSet<String> = TABLE.lines().skip(1).map(table_row).collect();
    let packages: BTreeSet<&str> = table.iter().map(|row| row.split('\t').nth(1).expect("a package")).collect();
    assert!(packages.len() >= 12, "the table lost packages: {packages:?}");

    let files = FileDescriptorSet::decode(actd::pb::DESCRIPTORS).expect("descriptors decode").file;
    let compiled: BTreeSet<String> =
        files.iter().filter(|file| packages.contains(file.package())).flat_map(file_rows).collect();

    let missing: Vec<_> = table.difference(&compiled).collect();
    let extra: Vec<_> = compiled.difference(&table).collect();
    assert!(
        missing.is_empty() && extra.is_empty(),
        "{} rows only in the table:\n{}\n{} rows only in proto/:\n{}",
        missing.len(),
        lines(&missing),
        extra.len(),
        lines(&extra),
    );
}

fn lines(rows: &[&String]) -> String {
    rows.iter().map(|row| format!("  {}\n", row.replace('\t', " | "))).collect()
}

fn table_row(line: &str) -> String {
    let mut columns: Vec<&str> = line.split('\t').take(COLUMNS).collect();
    columns.resize(COLUMNS, "");
    if columns[0] == "reserved" {
        columns[4] = ""; // what the number was once called: not part of the contract
    }
    columns.join("\t")
}

/// One row of the table; the columns a kind does not use stay empty.
#[derive(Default)]
struct Row<'a> {
    kind: &'a str,
    parent: &'a str,
    name: &'a str,
    number: Option<i32>,
    label: String,
    type_name: String,
    rpc: [String; 5],
}

/// What a row inherits from its file.
struct Scope<'a> {
    package: &'a str,
    syntax: &'a str,
}

impl Scope<'_> {
    fn row(&self, row: Row) -> String {
        let number = row.number.map(|n| n.to_string()).unwrap_or_default();
        let mut columns =
            vec![row.kind, self.package, self.syntax, row.parent, row.name, &number, &row.label, &row.type_name];
        columns.extend(row.rpc.iter().map(String::as_str));
        columns.join("\t")
    }
}

fn file_rows(file: &FileDescriptorProto) -> Vec<String> {
    let syntax = if file.syntax().is_empty() { "proto2" } else { file.syntax() };
    let scope = Scope { package: file.package(), syntax };
    let mut rows = Vec::new();
    for message in &file.message_type {
        message_rows(&scope, "", message, &mut rows);
    }
    for item in &file.enum_type {
        enum_rows(&scope, "", item, &mut rows);
    }
    for service in &file.service {
        service_rows(&scope, service, &mut rows);
    }
    for extension in &file.extension {
        rows.push(scope.row(Row {
            kind: "extension",
            parent: extension.extendee().trim_start_matches('.'),
            name: extension.name(),
            number: Some(extension.number()),
            // An extension has presence in either syntax, written or not.
            label: "optional".into(),
            type_name: type_name(extension),
            ..Row::default()
        }));
    }
    rows
}

/// Nested names are relative to the package: `RangeRequest.SortOrder`.
fn nested(parent: &str, name: &str) -> String {
    if parent.is_empty() { name.to_owned() } else { format!("{parent}.{name}") }
}

fn message_rows(scope: &Scope, parent: &str, message: &DescriptorProto, rows: &mut Vec<String>) {
    let name = nested(parent, message.name());
    rows.push(scope.row(Row { kind: "message", parent, name: &name, ..Row::default() }));
    for field in &message.field {
        let map = map_entry(message, field);
        rows.push(scope.row(Row {
            kind: "field",
            parent: &name,
            name: field.name(),
            number: Some(field.number()),
            label: if map.is_some() { "map".into() } else { label(scope, message, field) },
            type_name: map.unwrap_or_else(|| type_name(field)),
            ..Row::default()
        }));
    }
    for range in &message.reserved_range {
        for number in range.start()..range.end() {
            rows.push(scope.row(Row { kind: "reserved", parent: &name, number: Some(number), ..Row::default() }));
        }
    }
    for item in &message.enum_type {
        enum_rows(scope, &name, item, rows);
    }
    for inner in message.nested_type.iter().filter(|inner| !inner.options.as_ref().is_some_and(|o| o.map_entry())) {
        message_rows(scope, &name, inner, rows);
    }
}

fn label(scope: &Scope, message: &DescriptorProto, field: &FieldDescriptorProto) -> String {
    match (field.label(), field.oneof_index) {
        (Label::Repeated, _) => "repeated".into(),
        (Label::Required, _) => "required".into(),
        // A proto3 `optional` is compiled into a oneof of its own.
        (Label::Optional, Some(_)) if field.proto3_optional() => "optional".into(),
        (Label::Optional, Some(index)) => format!("oneof {}", message.oneof_decl[index as usize].name()),
        (Label::Optional, None) if scope.syntax == "proto3" => "singular".into(),
        (Label::Optional, None) => "optional".into(),
    }
}

fn map_entry(message: &DescriptorProto, field: &FieldDescriptorProto) -> Option<String> {
    let entry = message.nested_type.iter().find(|inner| {
        inner.options.as_ref().is_some_and(|o| o.map_entry())
            && field.type_name().ends_with(&format!(".{}.{}", message.name(), inner.name()))
    })?;
    Some(format!("map<{},{}>", type_name(&entry.field[0]), type_name(&entry.field[1])))
}

fn type_name(field: &FieldDescriptorProto) -> String {
    match field.r#type() {
        Type::Message | Type::Enum | Type::Group => field.type_name().trim_start_matches('.').to_owned(),
        scalar => scalar.as_str_name().trim_start_matches("TYPE_").to_lowercase(),
    }
}

fn enum_rows(scope: &Scope, parent: &str, item: &EnumDescriptorProto, rows: &mut Vec<String>) {
    let name = nested(parent, item.name());
    rows.push(scope.row(Row { kind: "enum", parent, name: &name, ..Row::default() }));
    for value in &item.value {
        rows.push(scope.row(Row {
            kind: "enum_value",
            parent: &name,
            name: value.name(),
            number: Some(value.number()),
            ..Row::default()
        }));
    }
}

fn service_rows(scope: &Scope, service: &ServiceDescriptorProto, rows: &mut Vec<String>) {
    let path = format!("/{}.{}", scope.package, service.name());
    let rpc = [String::new(), String::new(), String::new(), String::new(), path.clone()];
    rows.push(scope.row(Row { kind: "service", name: service.name(), rpc, ..Row::default() }));
    let yes_no = |flag: bool| if flag { "yes" } else { "no" }.to_owned();
    for method in &service.method {
        rows.push(scope.row(Row {
            kind: "rpc",
            parent: service.name(),
            name: method.name(),
            rpc: [
                method.input_type().trim_start_matches('.').to_owned(),
                method.output_type().trim_start_matches('.').to_owned(),
                yes_no(method.client_streaming()),
                yes_no(method.server_streaming()),
                format!("{path}/{}", method.name()),
            ],
            ..Row::default()
        }));
    }
}
