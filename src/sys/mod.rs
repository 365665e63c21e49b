//! Everything the kernel, the network or a bus is asked. Knows events and actions, never the core.

mod asking;
pub mod bus;
pub mod clock;
pub mod credentials;
pub mod doctor;
pub mod fetch;
pub mod helper;
pub mod http;
pub mod inbox;
pub mod jobs;
pub mod link;
pub mod logger;
pub mod memory;
pub mod network;
pub mod pressure;
pub mod process;
pub mod proxy;
pub mod signals;
pub mod signs;
pub mod store;
pub mod surroundings;
pub mod timer;
pub mod tls;
pub mod transfers;
pub mod users;
pub mod windows;
