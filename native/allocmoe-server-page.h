// The page of allocmoe-server, at /budget. Included by server.cpp.
#pragma once

struct server_http_context;

void allocmoe_server_page(const server_http_context & http);
