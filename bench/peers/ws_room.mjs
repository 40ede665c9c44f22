// Node's `ws`: one loop of `send` over its clients.

import { createServer } from "node:http";
import { WebSocket, WebSocketServer } from "ws";

const server = createServer((request, response) => {
  const parts = [];
  request.on("data", (part) => parts.push(part));
  request.on("end", () => {
    const text = Buffer.concat(parts);
    for (const client of sockets.clients) {
      if (client.readyState === WebSocket.OPEN) client.send(text, { binary: false });
    }
    response.writeHead(201, { "Content-Length": 0 }).end();
  });
});
const sockets = new WebSocketServer({ server, path: "/ws" });

server.listen({ host: "127.0.0.1", port: 0, backlog: 4096 }, () => {
  const url = `http://127.0.0.1:${server.address().port}`;
  console.error(JSON.stringify({ level: "info", event: "listening", url }));
});
