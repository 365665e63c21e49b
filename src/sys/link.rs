//! WebSocket links: mio TCP, rustls, tungstenite.
