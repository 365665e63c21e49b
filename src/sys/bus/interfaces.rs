//! What we serve: object paths, interfaces, and their introspection. Plain tables: the answers the bus thread gives by
//! itself, so that an app that introspects before anything else (libKUnifiedPush does, blocking) never waits.

/// The UnifiedPush object.
pub(super) const DISTRIBUTOR_PATH: &str = "/org/unifiedpush/Distributor";
/// Our own object.
pub(super) const NIGHTPORTER_PATH: &str = "/org/nightporter1";
/// What KDE's settings panel calls.
pub(super) const MANAGEMENT_PATH: &str = "/Management";

/// The names asked for, in this order.
pub(super) const NAMES: [&str; 2] = ["org.unifiedpush.Distributor.nightporter", "org.nightporter1"];

pub(super) const DISTRIBUTOR1: &str = "org.unifiedpush.Distributor1";
pub(super) const DISTRIBUTOR2: &str = "org.unifiedpush.Distributor2";
pub(super) const APP: &str = "org.nightporter1.App";
pub(super) const TRANSFERS: &str = "org.nightporter1.Transfers";
pub(super) const MANAGER: &str = "org.nightporter1.Manager";
pub(super) const MANAGEMENT: &str = "org.kde.kunifiedpush.Management";
pub(super) const INTROSPECTABLE: &str = "org.freedesktop.DBus.Introspectable";
pub(super) const PEER: &str = "org.freedesktop.DBus.Peer";
pub(super) const PROPERTIES: &str = "org.freedesktop.DBus.Properties";

/// The value of `org.nightporter1.Manager.Version`.
pub(super) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Our own interfaces at `path`; `None` when there is nothing at it. An inner node has none. `panel` says whether KDE's
/// settings panel is served.
pub(super) fn interfaces(path: &str, panel: bool) -> Option<&'static [&'static str]> {
    match path {
        DISTRIBUTOR_PATH => Some(&[DISTRIBUTOR1, DISTRIBUTOR2]),
        NIGHTPORTER_PATH => Some(&[APP, TRANSFERS, MANAGER]),
        MANAGEMENT_PATH if panel => Some(&[MANAGEMENT]),
        "/" | "/org" | "/org/unifiedpush" => Some(&[]),
        _ => None,
    }
}

/// The members of an interface.
pub(super) fn members(interface: &str) -> &'static [&'static str] {
    match interface {
        DISTRIBUTOR1 | DISTRIBUTOR2 => &["Register", "Unregister"],
        APP => &["SetState", "SetStateOf", "Lease", "Listen", "SaveState", "RestoreState"],
        TRANSFERS => &["Download", "Upload", "Collect", "Cancel", "List"],
        MANAGER => &[
            "Status",
            "Apps",
            "Show",
            "Why",
            "Report",
            "History",
            "WhatIf",
            "Log",
            "Endpoints",
            "Freeze",
            "Thaw",
            "Kill",
            "Move",
            "ForgetUser",
            "Leases",
            "EndLease",
            "Transfers",
            "CancelTransfer",
        ],
        MANAGEMENT => &[
            "status",
            "errorMessage",
            "pushProviderId",
            "pushProviderConfiguration",
            "setPushProvider",
            "registeredClients",
            "forceUnregisterClient",
        ],
        INTROSPECTABLE => &["Introspect"],
        PEER => &["Ping", "GetMachineId"],
        PROPERTIES => &["Get", "GetAll", "Set"],
        _ => &[],
    }
}

/// The introspection document of the object at `path`, which must be one of ours.
pub(super) fn introspection(path: &str, panel: bool) -> String {
    let own = match path {
        DISTRIBUTOR_PATH => DISTRIBUTOR_XML,
        NIGHTPORTER_PATH => NIGHTPORTER_XML,
        MANAGEMENT_PATH => MANAGEMENT_XML,
        "/" if panel => "<node name=\"org\"/>\n<node name=\"Management\"/>\n",
        "/" => "<node name=\"org\"/>\n",
        "/org" => "<node name=\"unifiedpush\"/>\n<node name=\"nightporter1\"/>\n",
        "/org/unifiedpush" => "<node name=\"Distributor\"/>\n",
        _ => "",
    };
    format!("{DOCTYPE}<node>\n{STANDARD_XML}{own}</node>\n")
}

const DOCTYPE: &str = "<!DOCTYPE node PUBLIC \"-//freedesktop//DTD D-BUS Object Introspection 1.0//EN\" \
                       \"http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd\">\n";

const STANDARD_XML: &str = r#"<interface name="org.freedesktop.DBus.Introspectable">
  <method name="Introspect"><arg name="xml_data" type="s" direction="out"/></method>
</interface>
<interface name="org.freedesktop.DBus.Peer">
  <method name="Ping"/>
  <method name="GetMachineId"><arg name="machine_uuid" type="s" direction="out"/></method>
</interface>
<interface name="org.freedesktop.DBus.Properties">
  <method name="Get">
    <arg name="interface_name" type="s" direction="in"/>
    <arg name="property_name" type="s" direction="in"/>
    <arg name="value" type="v" direction="out"/>
  </method>
  <method name="GetAll">
    <arg name="interface_name" type="s" direction="in"/>
    <arg name="properties" type="a{sv}" direction="out"/>
  </method>
  <method name="Set">
    <arg name="interface_name" type="s" direction="in"/>
    <arg name="property_name" type="s" direction="in"/>
    <arg name="value" type="v" direction="in"/>
  </method>
</interface>
"#;

const DISTRIBUTOR_XML: &str = r#"<interface name="org.unifiedpush.Distributor1">
  <method name="Register">
    <arg name="serviceName" type="s" direction="in"/>
    <arg name="token" type="s" direction="in"/>
    <arg name="description" type="s" direction="in"/>
    <arg name="registrationResult" type="s" direction="out"/>
    <arg name="registrationResultReason" type="s" direction="out"/>
  </method>
  <method name="Unregister">
    <arg name="token" type="s" direction="in"/>
    <annotation name="org.freedesktop.DBus.Method.NoReply" value="true"/>
  </method>
</interface>
<interface name="org.unifiedpush.Distributor2">
  <method name="Register">
    <arg name="args" type="a{sv}" direction="in"/>
    <arg name="result" type="a{sv}" direction="out"/>
  </method>
  <method name="Unregister">
    <arg name="args" type="a{sv}" direction="in"/>
    <arg name="result" type="a{sv}" direction="out"/>
  </method>
</interface>
"#;

const NIGHTPORTER_XML: &str = r#"<interface name="org.nightporter1.App">
  <method name="SetState"><arg name="state" type="s" direction="in"/></method>
  <method name="SetStateOf">
    <arg name="service" type="s" direction="in"/>
    <arg name="state" type="s" direction="in"/>
  </method>
  <method name="Lease">
    <arg name="kind" type="s" direction="in"/>
    <arg name="reason" type="s" direction="in"/>
    <arg name="options" type="a{sv}" direction="in"/>
    <arg name="lease" type="h" direction="out"/>
    <arg name="id" type="u" direction="out"/>
  </method>
  <signal name="LeaseEnding">
    <arg name="id" type="u"/>
    <arg name="milliseconds" type="t"/>
  </signal>
  <method name="Listen"><arg name="on" type="b" direction="in"/></method>
  <method name="SaveState"><arg name="state" type="ay" direction="in"/></method>
  <method name="RestoreState"><arg name="state" type="ay" direction="out"/></method>
</interface>
<interface name="org.nightporter1.Transfers">
  <method name="Download">
    <arg name="url" type="s" direction="in"/>
    <arg name="headers" type="a{ss}" direction="in"/>
    <arg name="options" type="a{sv}" direction="in"/>
    <arg name="id" type="t" direction="out"/>
  </method>
  <method name="Upload">
    <arg name="url" type="s" direction="in"/>
    <arg name="size" type="t" direction="in"/>
    <arg name="headers" type="a{ss}" direction="in"/>
    <arg name="options" type="a{sv}" direction="in"/>
    <arg name="content" type="h" direction="out"/>
    <arg name="id" type="t" direction="out"/>
  </method>
  <method name="Collect">
    <arg name="id" type="t" direction="in"/>
    <arg name="file" type="h" direction="out"/>
    <arg name="size" type="t" direction="out"/>
  </method>
  <method name="Cancel"><arg name="id" type="t" direction="in"/></method>
  <method name="List"><arg name="json" type="s" direction="out"/></method>
</interface>
<interface name="org.nightporter1.Manager">
  <method name="Status"><arg name="json" type="s" direction="out"/></method>
  <method name="Apps"><arg name="json" type="s" direction="out"/></method>
  <method name="Show">
    <arg name="service" type="s" direction="in"/>
    <arg name="json" type="s" direction="out"/>
  </method>
  <method name="Why">
    <arg name="service" type="s" direction="in"/>
    <arg name="json" type="s" direction="out"/>
  </method>
  <method name="Report"><arg name="json" type="s" direction="out"/></method>
  <method name="History">
    <arg name="hours" type="u" direction="in"/>
    <arg name="json" type="s" direction="out"/>
  </method>
  <method name="WhatIf">
    <arg name="hours" type="u" direction="in"/>
    <arg name="json" type="s" direction="out"/>
  </method>
  <method name="Log">
    <arg name="after" type="t" direction="in"/>
    <arg name="json" type="s" direction="out"/>
  </method>
  <method name="Endpoints">
    <arg name="service" type="s" direction="in"/>
    <arg name="json" type="s" direction="out"/>
  </method>
  <method name="Freeze"><arg name="service" type="s" direction="in"/></method>
  <method name="Thaw"><arg name="service" type="s" direction="in"/></method>
  <method name="Kill"><arg name="service" type="s" direction="in"/></method>
  <method name="Move">
    <arg name="service" type="s" direction="in"/>
    <arg name="upstream" type="s" direction="in"/>
  </method>
  <method name="ForgetUser"><arg name="uid" type="u" direction="in"/></method>
  <method name="Leases">
    <arg name="service" type="s" direction="in"/>
    <arg name="json" type="s" direction="out"/>
  </method>
  <method name="EndLease"><arg name="id" type="u" direction="in"/></method>
  <method name="Transfers">
    <arg name="service" type="s" direction="in"/>
    <arg name="json" type="s" direction="out"/>
  </method>
  <method name="CancelTransfer"><arg name="id" type="t" direction="in"/></method>
  <property name="Version" type="s" access="read">
    <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="const"/>
  </property>
</interface>
"#;

const MANAGEMENT_XML: &str = r#"<interface name="org.kde.kunifiedpush.Management">
  <method name="status"><arg name="status" type="i" direction="out"/></method>
  <method name="errorMessage"><arg name="errorMessage" type="s" direction="out"/></method>
  <method name="pushProviderId"><arg name="pushProviderId" type="s" direction="out"/></method>
  <method name="pushProviderConfiguration">
    <arg name="pushProviderId" type="s" direction="in"/>
    <arg name="config" type="a{sv}" direction="out"/>
    <annotation name="org.qtproject.QtDBus.QtTypeName.Out0" value="QVariantMap"/>
  </method>
  <method name="setPushProvider">
    <arg name="pushProviderId" type="s" direction="in"/>
    <arg name="config" type="a{sv}" direction="in"/>
    <annotation name="org.qtproject.QtDBus.QtTypeName.In1" value="QVariantMap"/>
    <annotation name="org.freedesktop.DBus.Method.NoReply" value="true"/>
  </method>
  <method name="registeredClients">
    <arg name="clients" type="a(sss)" direction="out"/>
    <annotation name="org.qtproject.QtDBus.QtTypeName.Out0" value="QList&lt;KUnifiedPush::ClientInfo&gt;"/>
  </method>
  <method name="forceUnregisterClient">
    <arg name="token" type="s" direction="in"/>
    <annotation name="org.freedesktop.DBus.Method.NoReply" value="true"/>
  </method>
  <signal name="statusChanged"/>
  <signal name="errorMessageChanged"/>
  <signal name="pushProviderChanged"/>
  <signal name="registeredClientsChanged"/>
</interface>
"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn introspection_names_every_member() {
        for path in [DISTRIBUTOR_PATH, NIGHTPORTER_PATH, MANAGEMENT_PATH, "/", "/org", "/org/unifiedpush"] {
            let xml = introspection(path, true);
            let all = interfaces(path, true).unwrap().iter().chain(&[INTROSPECTABLE, PEER, PROPERTIES]);
            for interface in all {
                assert!(xml.contains(&format!("<interface name=\"{interface}\">")), "{path} {interface}");
                for member in members(interface) {
                    assert!(xml.contains(&format!("<method name=\"{member}\"")), "{path} {interface} {member}");
                }
            }
            assert_eq!(xml.matches("<interface ").count(), xml.matches("</interface>").count());
        }
        assert_eq!(interfaces("/org/unifiedpush/Other", true), None);
        assert_eq!(interfaces(MANAGEMENT_PATH, false), None);
        assert!(!introspection("/", false).contains("Management"));
    }
}
