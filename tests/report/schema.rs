//! JSON Schema (2020-12), as much of it as docs/report.schema.json uses; anything else in a schema is a failure.

use std::collections::BTreeSet;

use serde_json::Value;

/// What a document has against it. Members the schema does not name are wrong as well: what is put out is documented.
pub(crate) fn check(root: &Value, schema: &Value, document: &Value, path: &str, wrong: &mut Vec<String>) {
    let schema_ = schema.as_object().unwrap();
    for (keyword, asked) in schema_ {
        let holds = match keyword.as_str() {
            "$schema" | "$id" | "title" | "$defs" | "description" | "properties" => true,
            "$ref" => {
                let pointer = asked.as_str().unwrap().strip_prefix('#').unwrap();
                check(root, root.pointer(pointer).unwrap(), document, path, wrong);
                true
            }
            "type" => match asked {
                Value::Array(types) => types.iter().any(|kind| is(document, kind)),
                kind => is(document, kind),
            },
            "enum" => asked.as_array().unwrap().contains(document),
            "anyOf" => asked.as_array().unwrap().iter().any(|option| {
                let mut against = Vec::new();
                check(root, option, document, path, &mut against);
                against.is_empty()
            }),
            "minimum" => document.as_f64().is_none_or(|number| number >= asked.as_f64().unwrap()),
            "format" => {
                assert_eq!(asked, "date-time");
                document.as_str().is_none_or(|text| humantime::parse_rfc3339(text).is_ok())
            }
            "items" => {
                for (index, item) in document.as_array().into_iter().flatten().enumerate() {
                    check(root, asked, item, &format!("{path}[{index}]"), wrong);
                }
                true
            }
            "required" => asked.as_array().unwrap().iter().all(|key| document.get(key.as_str().unwrap()).is_some()),
            other => panic!("the schema uses {other}, which this test does not know"),
        };
        if !holds {
            wrong.push(format!("{path}: {keyword} {asked}, but it is {document}"));
        }
    }
    let named = schema_.get("properties").and_then(Value::as_object);
    for (key, value) in document.as_object().into_iter().flatten().filter(|_| schema_.get("type").is_some()) {
        match named.and_then(|named| named.get(key)) {
            Some(schema) => check(root, schema, value, &format!("{path}.{key}"), wrong),
            None => wrong.push(format!("{path}.{key} is not documented")),
        }
    }
}

/// Members that have no description.
pub(crate) fn undescribed(schema: &Value, path: &str, found: &mut BTreeSet<String>) {
    for (key, inner) in schema.as_object().into_iter().flatten() {
        let is_members = key == "properties";
        for (name, member) in inner.as_object().into_iter().flatten().filter(|_| is_members) {
            if member.get("description").is_none() {
                found.insert(format!("{path}.{name}"));
            }
        }
        undescribed(inner, &format!("{path}.{key}"), found);
    }
}

fn is(document: &Value, kind: &Value) -> bool {
    match kind.as_str().unwrap() {
        "object" => document.is_object(),
        "array" => document.is_array(),
        "string" => document.is_string(),
        "number" => document.is_number(),
        "integer" => document.is_i64() || document.is_u64(),
        "null" => document.is_null(),
        "boolean" => document.is_boolean(),
        other => panic!("the schema uses the type {other}"),
    }
}
