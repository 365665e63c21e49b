//! An app played by this test: a connection with a connector behind it. The daemon never touches its process, because it
//! runs below it itself.

use std::{collections::HashMap, sync::mpsc, thread::JoinHandle, time::Duration};

use zbus::{Connection, Message, MessageStream, OwnedVariant, Variant, block_on};

use super::{
    PATIENCE,
    bus::{Behaviour, DISTRIBUTOR, DISTRIBUTOR_PATH, answer_all, connect, error_of, run},
};

/// How long silence is listened to before it is believed.
const SILENCE: Duration = Duration::from_millis(300);

pub(crate) type Dict = HashMap<&'static str, Variant<'static>>;

pub(crate) fn dict(entries: &[(&'static str, &str)]) -> Dict {
    entries.iter().map(|(key, value)| (*key, Variant::from((*value).to_owned()))).collect()
}

/// An app.
pub(crate) struct Client {
    pub(crate) connection: Connection,
    /// What it registers as.
    pub(crate) service: String,
    calls: mpsc::Receiver<Message>,
    quit: async_channel::Sender<()>,
    thread: Option<JoinHandle<()>>,
}

/// A call of its connector, whichever version.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) member: String,
    pub(crate) interface: String,
    pub(crate) path: String,
    pub(crate) token: Option<String>,
    pub(crate) endpoint: Option<String>,
    pub(crate) message: Option<Vec<u8>>,
    pub(crate) id: Option<String>,
}

impl Client {
    /// With this name, or as its unique name alone.
    pub(crate) fn start(address: &str, name: Option<&str>, behaviour: Behaviour) -> Self {
        let (address, name) = (address.to_owned(), name.map(str::to_owned));
        let (told, started) = mpsc::channel();
        let (seen, calls) = mpsc::channel();
        let (quit, quitting) = async_channel::bounded(1);
        let thread = run(async move {
            let connection = connect(&address).await;
            let stream = MessageStream::from(&connection);
            if let Some(name) = &name {
                connection.request_name(name.as_str()).await.unwrap();
            }
            let service = name.unwrap_or_else(|| connection.unique_name().unwrap().to_string());
            told.send((connection.clone(), service)).unwrap();
            let serving = connection.clone();
            let task = zruntime::spawn(async move { answer_all(&serving, stream, behaviour, seen).await });
            let _ = quitting.recv().await;
            drop(task);
            let _ = connection.close().await;
        });
        let (connection, service) = started.recv_timeout(PATIENCE).unwrap();
        Self { connection, service, calls, quit, thread: Some(thread) }
    }

    /// `success` and `reason` of version 2.
    pub(crate) fn register(&self, token: &str) -> (String, String) {
        self.register_with(dict(&[("service", &self.service), ("token", token)]))
    }

    pub(crate) fn register_with(&self, arguments: Dict) -> (String, String) {
        let reply = self.distributor("org.unifiedpush.Distributor2", "Register", &arguments).unwrap();
        let reply: HashMap<String, OwnedVariant> = reply.body().deserialize().unwrap();
        let text = |key: &str| reply.get(key).map_or("", |value| <&str>::try_from(value).unwrap()).to_owned();
        (text("success"), text("reason"))
    }

    /// Result and reason of version 1.
    pub(crate) fn register_v1(&self, token: &str) -> (String, String) {
        let arguments = (self.service.as_str(), token, "old");
        let reply = self.distributor("org.unifiedpush.Distributor1", "Register", &arguments).unwrap();
        reply.body().deserialize().unwrap()
    }

    /// Registers, which must succeed, and takes the endpoint.
    pub(crate) fn endpoint(&self, token: &str) -> String {
        assert_eq!(self.register(token).0, "REGISTRATION_SUCCEEDED");
        let call = self.call();
        assert_eq!((call.member.as_str(), call.token.as_deref()), ("NewEndpoint", Some(token)));
        call.endpoint.unwrap()
    }

    pub(crate) fn unregister(&self, token: &str) {
        self.distributor("org.unifiedpush.Distributor2", "Unregister", &dict(&[("token", token)])).unwrap();
    }

    pub(crate) fn unregister_v1(&self, token: &str) {
        self.distributor("org.unifiedpush.Distributor1", "Unregister", &token).unwrap();
    }

    pub(crate) fn distributor<B>(&self, interface: &str, member: &str, body: &B) -> zbus::Result<Message>
    where
        B: serde::Serialize + zbus::DynamicType + Sync,
    {
        block_on(self.connection.call_method(Some(DISTRIBUTOR), DISTRIBUTOR_PATH, Some(interface), member, body))
    }

    /// Calls the distributor and does not wait for its answer.
    pub(crate) fn send(&self, member: &'static str, arguments: &Dict) {
        let call = Message::method_call(DISTRIBUTOR_PATH, member).destination(DISTRIBUTOR);
        let call = call.interface("org.unifiedpush.Distributor2").build(arguments).unwrap();
        block_on(self.connection.send(&call)).unwrap();
    }

    /// Calls `org.nightporter1` as this app; the name of the error that comes back, if one does.
    pub(crate) fn porter(&self, interface: &str, member: &str, arguments: &[&str]) -> Result<(), String> {
        let (name, path) = ("org.nightporter1", "/org/nightporter1");
        let call = |body: zbus::Result<Message>| body.map(drop);
        let connection = &self.connection;
        let result = match arguments {
            [] => call(block_on(connection.call_method(Some(name), path, Some(interface), member, &()))),
            [one] => call(block_on(connection.call_method(Some(name), path, Some(interface), member, one))),
            [one, two] => {
                call(block_on(connection.call_method(Some(name), path, Some(interface), member, &(one, two))))
            }
            _ => panic!("{arguments:?}"),
        };
        result.map_err(|error| error_of(Err(error)).0)
    }

    /// The next call of its connector.
    pub(crate) fn call(&self) -> Call {
        read(&self.calls.recv_timeout(PATIENCE).expect("the connector is not called"))
    }

    /// The text of the next message, which must be the next call.
    pub(crate) fn message(&self) -> String {
        let call = self.call();
        assert_eq!(call.member, "Message", "{call:?}");
        call.text()
    }

    /// The same where the daemon or the bus has ended meanwhile: it may not have heard that the endpoint was taken, and
    /// tell it once more.
    pub(crate) fn next_message(&self) -> String {
        loop {
            let call = self.call();
            if call.member != "NewEndpoint" {
                assert_eq!(call.member, "Message", "{call:?}");
                return call.text();
            }
        }
    }

    /// What it is told next of a transfer: which, how it ended, and more about that. Other calls are passed over.
    pub(crate) fn told(&self) -> (u64, String, String) {
        loop {
            let call = self.calls.recv_timeout(PATIENCE).expect("it is told of no transfer");
            if call.header().member().is_some_and(|member| member.as_str() == "TransferDone") {
                return call.body().deserialize().unwrap();
            }
        }
    }

    /// Whether the connector is not called for a while.
    pub(crate) fn hears_nothing(&self) -> bool {
        self.calls.recv_timeout(SILENCE).map(|call| eprintln!("{:?}", read(&call))).is_err()
    }

    pub(crate) fn quit(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let _ = self.quit.try_send(());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.end();
    }
}

impl Call {
    /// The message, where it is text.
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.message.clone().unwrap()).unwrap()
    }
}

fn read(message: &Message) -> Call {
    let header = message.header();
    let mut call = Call {
        member: header.member().unwrap().to_string(),
        interface: header.interface().unwrap().to_string(),
        path: header.path().unwrap().to_string(),
        ..Call::default()
    };
    let body = message.body();
    if call.interface == "org.unifiedpush.Connector1" {
        match call.member.as_str() {
            "NewEndpoint" => {
                let (token, endpoint) = body.deserialize::<(String, String)>().unwrap();
                (call.token, call.endpoint) = (Some(token), Some(endpoint));
            }
            "Message" => {
                let (token, message, id) = body.deserialize::<(String, Vec<u8>, String)>().unwrap();
                (call.token, call.message, call.id) = (Some(token), Some(message), Some(id));
            }
            _ => call.token = Some(body.deserialize::<String>().unwrap()),
        }
    } else {
        let mut dict: HashMap<String, OwnedVariant> = body.deserialize().unwrap();
        let mut text = |key: &str| dict.remove(key).map(|value| String::try_from(value).unwrap());
        (call.token, call.endpoint, call.id) = (text("token"), text("endpoint"), text("id"));
        call.message = dict.remove("message").map(|value| Vec::try_from(value).unwrap());
    }
    call
}
