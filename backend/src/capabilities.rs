//! What `--print-capabilities` tells management applications
//! (vhost-user: Backend program conventions; `VHostUserBackendCapabilities` in vhost-user.json).
#![forbid(unsafe_code)]

use serde::Serialize;

/// The capabilities object. The schema defines no feature names for type `net`, so its list is empty.
#[derive(Debug, Serialize)]
struct Capabilities {
    r#type: &'static str,
    features: &'static [&'static str],
}

/// The capabilities as JSON text with a final newline.
pub fn capabilities_json() -> String {
    let capabilities = Capabilities { r#type: "net", features: &[] };
    // Serialising two literals cannot fail; an empty object would still be valid JSON.
    let mut text = serde_json::to_string_pretty(&capabilities).unwrap_or_else(|_| "{}".to_owned());
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    #[test]
    fn capabilities_follow_the_convention() {
        let value: Value = serde_json::from_str(&super::capabilities_json()).expect("valid JSON");
        assert_eq!(value, json!({"type": "net", "features": []}));
    }

    /// `VhostUserBackend` of vhost-user.json: description, type and binary are required, tags may follow.
    #[test]
    fn installed_descriptor_fits_the_schema() {
        let text = include_str!("../contrib/50-vhost-user-net.json");
        let value: Value = serde_json::from_str(text).expect("valid JSON");
        assert_eq!(value["type"], "net");
        assert!(value["description"].is_string());
        assert!(value["binary"].as_str().is_some_and(|b| b.starts_with('/')));
        for key in value.as_object().expect("an object").keys() {
            assert!(["description", "type", "binary", "tags"].contains(&key.as_str()), "{key}");
        }
    }
}
